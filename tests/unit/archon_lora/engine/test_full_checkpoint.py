"""Whole models to and from HuggingFace directories, in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.engines import batch_of, names_in, tiny_model, train, weights_of

from archon_lora.engine.full_checkpoint import load_full_model, save_full_model
from archon_lora.errors import ArchonLoraError, ModelLoadError
from ckpt.errors import NonFiniteError


@pytest.mark.parametrize("tie", [False, True])
def test_a_round_trip_through_one_file(engine_of, tmp_path: Path, tie: bool) -> None:
    path = tiny_model(tmp_path / "base", tie=tie)
    engine = engine_of(path, lora=None)
    train(engine, 1)
    save_full_model(engine, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["config.json", "model.safetensors"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert names == load_file(tmp_path / "base" / "model.safetensors").keys()
    other = engine_of(path, lora=None)
    load_full_model(other, tmp_path / "out")
    again = engine_of(str(tmp_path / "out"), lora=None)
    wanted = weights_of(engine)
    for loaded in (other, again):
        got = weights_of(loaded)
        assert all(torch.equal(got[name], value) for name, value in wanted.items())


def test_many_files_and_their_index(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=None)
    save_full_model(engine, tmp_path, max_file_bytes=4096)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert names_in(tmp_path) == sorted([*files, "config.json", "model.safetensors.index.json"])
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    other = engine_of(str(tmp_path), lora=None)
    assert torch.equal(other.logprobs(batch_of()), engine.logprobs(batch_of()))
    # A smaller number of files afterwards leaves none of the old ones behind.
    (tmp_path / "model-card.md").write_text("stays")
    save_full_model(engine, tmp_path)
    assert names_in(tmp_path) == ["config.json", "model-card.md", "model.safetensors"]


def test_the_config_says_the_dtype_that_was_written(engine_of, tmp_path: Path) -> None:
    save_full_model(engine_of(lora=None, dtype="bfloat16"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}


def test_the_model_it_was_built_from_is_never_overwritten(engine_of, tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "base")
    engine = engine_of(path, lora=None)
    (tmp_path / "link").symlink_to(path)
    for target in (path, tmp_path / "link"):
        with pytest.raises(ArchonLoraError, match="the model that this engine was built from"):
            save_full_model(engine, target)


def test_a_failed_save_leaves_nothing_that_loads(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=None)
    save_full_model(engine, tmp_path)
    with torch.no_grad():
        engine.model.norm.weight.to_local().fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        save_full_model(engine, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_another_shape_is_refused_before_anything_changes(engine_of, tmp_path: Path) -> None:
    wider = tiny_model(tmp_path / "wider", intermediate=40)
    engine = engine_of(lora=None)
    before = weights_of(engine)
    with pytest.raises(ModelLoadError, match=r"gate_proj\.weight"):
        load_full_model(engine, wider)
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())
