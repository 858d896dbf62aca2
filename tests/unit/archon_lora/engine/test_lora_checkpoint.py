"""Adapters to and from PEFT directories, in one process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.engines import batch_of, moved, names_in, tiny_model, train, weights_of

from archon_lora.apply import apply_lora
from archon_lora.config import LoRAConfig
from archon_lora.engine import (
    EngineLike,
    is_lora_adapter_checkpoint,
    load_lora_adapter,
    save_lora_adapter,
)
from archon_lora.errors import AdapterMismatch, AdapterNotFound, LoRANotEnabled, NoAdapterError
from archon_lora.models import load_pretrained
from ckpt.errors import DamagedError, NonFiniteError, StorageError

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def _adapter(engine) -> dict[str, torch.Tensor]:
    return weights_of(engine, trainable=True)


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize(
    "lora",
    [
        LoRAConfig(rank=4, alpha=8.0),
        LoRAConfig(rank=3, alpha=7.0, use_rslora=True, target_modules=["q_proj", "lm_head"]),
        LoRAConfig(rank=4, alpha=6.0, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3.0}),
        LoRAConfig(rank=2, adapter_dtype=torch.bfloat16),
    ],
    ids=["plain", "rslora", "patterns", "bf16"],
)
def test_a_round_trip_keeps_every_bit(engine_of, tmp_path: Path, lora: LoRAConfig) -> None:
    engine = moved(engine_of(lora=lora))
    save_lora_adapter(engine, tmp_path / "adapter")
    assert is_lora_adapter_checkpoint(tmp_path / "adapter")
    other = engine_of(lora=lora)
    assert not _same(_adapter(other), _adapter(engine))
    load_lora_adapter(other, tmp_path / "adapter")
    assert _same(_adapter(other), _adapter(engine))
    assert torch.equal(other.logprobs(batch_of()), engine.logprobs(batch_of()))


def test_the_files_are_peft_s(engine_of, tmp_path: Path) -> None:
    engine = moved(engine_of(lora=LoRAConfig(rank=4, alpha=8.0, target_modules=["q_proj"])))
    save_lora_adapter(engine, tmp_path, "org/base")
    assert names_in(tmp_path) == ["adapter_config.json", "adapter_model.safetensors"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensors) == [
        f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_{f}.weight"
        for i in range(2)
        for f in "AB"
    ]
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    live = _adapter(engine)
    assert torch.equal(
        tensors[f"{PREFIX}.lora_B.weight"], live["layers.0.attention.wq.lora_b.weight"]
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj"])
    assert config["base_model_name_or_path"] == "org/base"


def test_only_the_documented_attributes_are_used(model_dir: str, tmp_path: Path) -> None:
    model, names = load_pretrained(model_dir)
    lora = LoRAConfig(rank=2)
    apply_lora(model, lora, name_map=names.module_to_hf)
    allowed = {name for name in dir(EngineLike) if not name.startswith("_")}
    values = {
        "cpu_group": None,
        "model_parts": [model],
        "lora_config": lora,
        "config": SimpleNamespace(path=model_dir),
    }

    class Strict:
        def __getattr__(self, name: str) -> object:
            assert name in allowed, name
            return values[name]

    save_lora_adapter(Strict(), tmp_path / "adapter")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(1.0)
    load_lora_adapter(Strict(), tmp_path / "adapter")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_other_files_stay_and_a_second_save_replaces(engine_of, tmp_path: Path) -> None:
    engine = engine_of()
    (tmp_path / "tokenizer.json").write_text("{}")
    save_lora_adapter(engine, tmp_path)
    first = (tmp_path / "adapter_model.safetensors").read_bytes()
    train(engine, 1)
    save_lora_adapter(engine, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != first
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("same_config", [True, False])
def test_a_failed_save_leaves_the_old_adapter_whole(
    engine_of, tmp_path: Path, same_config: bool
) -> None:
    engine = engine_of()
    save_lora_adapter(engine, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    train(engine, 1)
    with torch.no_grad():
        # The last tensor of the file, so that all others were written out by then.
        engine.trainable_params()[-1].to_local().fill_(float("nan"))
    with pytest.raises(NonFiniteError):
        save_lora_adapter(engine, tmp_path, None if same_config else "another/base")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_weights_and_config_of_two_adapters_are_never_seen_together(
    engine_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_lora_adapter(engine_of(), tmp_path)
    seen = []
    replace = os.replace

    def watched(source: str, target: str, **options: object) -> None:
        replace(source, target, **options)
        seen.append(((tmp_path / "adapter_config.json").is_file(), Path(str(target)).name))

    monkeypatch.setattr(os, "replace", watched)
    save_lora_adapter(engine_of(lora=LoRAConfig(rank=4, alpha=99.0)), tmp_path)
    assert seen == [(False, "adapter_model.safetensors"), (True, "adapter_config.json")]


def test_a_path_that_cannot_be_written_says_so(engine_of, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        save_lora_adapter(engine_of(), tmp_path / "file" / "adapter")


def _saved(engine, path: Path) -> dict[str, torch.Tensor]:
    save_lora_adapter(engine, path)
    return load_file(path / "adapter_model.safetensors")


def test_a_legacy_bin_loads_like_safetensors(engine_of, tmp_path: Path) -> None:
    engine = moved(engine_of())
    tensors = _saved(engine, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    other = engine_of()
    load_lora_adapter(other, tmp_path)
    assert _same(_adapter(other), _adapter(engine))


@pytest.mark.parametrize("what", ["value", "last value"])
def test_values_that_are_not_finite_are_refused(engine_of, tmp_path: Path, what: str) -> None:
    engine = moved(engine_of())
    tensors = _saved(engine, tmp_path)
    key = sorted(tensors)[0 if what == "value" else -1]
    tensors[key][-1, -1] = float("inf")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    before = _adapter(engine)
    with pytest.raises(AdapterMismatch, match="not finite"):
        load_lora_adapter(engine, tmp_path)
    assert _same(_adapter(engine), before)


def test_a_url_is_not_taken_for_a_path(engine_of) -> None:
    with pytest.raises(AdapterNotFound, match=r"s3://bucket/x is a URL; warm_start\(engine, url\)"):
        load_lora_adapter(engine_of(), "s3://bucket/x")


@pytest.mark.parametrize("left", [None, "adapter_config.json", "adapter_model.safetensors"])
def test_what_is_missing_is_named_with_its_full_path(
    engine_of, tmp_path: Path, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of()
    _saved(engine, tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        if file.name != left:
            file.unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterNotFound) as caught:
        load_lora_adapter(engine, "adapter")
    text = str(caught.value)
    assert str(tmp_path / "adapter") in text
    assert "expected adapter_model.safetensors (or adapter_model.bin)" in text
    assert f"but it holds {left or 'nothing'}" in text


def test_damaged_weights_are_told_apart_from_missing_ones(engine_of, tmp_path: Path) -> None:
    engine = engine_of()
    _saved(engine, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    with pytest.raises(DamagedError, match="not a safetensors file"):
        load_lora_adapter(engine, tmp_path)


def test_without_lora_both_directions_name_the_setting(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=None)
    for call in (save_lora_adapter, load_lora_adapter):
        with pytest.raises(LoRANotEnabled, match=r"not enabled on this engine: set use_lora=true"):
            call(engine, tmp_path)
    assert not list(tmp_path.iterdir())


def test_lora_without_parameters_is_an_error_both_ways(
    model_dir: str, tmp_path: Path, engine_of
) -> None:
    _saved(engine_of(), tmp_path / "good")
    bare, _ = load_pretrained(model_dir)
    engine = SimpleNamespace(
        cpu_group=None,
        model_parts=[bare],
        lora_config=LoRAConfig(rank=2),
        config=SimpleNamespace(path=model_dir),
    )
    with pytest.raises(NoAdapterError, match="no adapter parameters, so there is nothing to save"):
        save_lora_adapter(engine, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(NoAdapterError, match="no adapter parameters"):
        load_lora_adapter(engine, tmp_path / "good")


def test_two_parts_of_a_model_make_one_adapter(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "model")
    lora = LoRAConfig(rank=2, target_modules=["q_proj", "lm_head"])
    halves = []
    for _ in range(2):
        model, names = load_pretrained(path)
        apply_lora(model, lora, name_map=names.module_to_hf)
        halves.append(model)
    with torch.no_grad():
        for half in halves:
            for name, parameter in half.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.full_like(parameter, len(name) / 10))
    whole = SimpleNamespace(
        cpu_group=None,
        model_parts=[halves[0]],
        lora_config=lora,
        config=SimpleNamespace(path=path),
    )
    save_lora_adapter(whole, tmp_path / "whole")
    # As pipeline stages hold them: the first the blocks, the second the head.
    first, second = _stage(halves[0], "layers"), _stage(halves[1], "output")
    staged = SimpleNamespace(**{**vars(whole), "model_parts": [first, second]})
    save_lora_adapter(staged, tmp_path / "staged")
    weights = "adapter_model.safetensors"
    assert (tmp_path / "staged" / weights).read_bytes() == (
        tmp_path / "whole" / weights
    ).read_bytes()
    config = json.loads((tmp_path / "staged" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    before = {n: p.detach().clone() for s in (first, second) for n, p in s.named_parameters()}
    with torch.no_grad():
        for part in (first, second):
            for parameter in part.parameters():
                if parameter.requires_grad:
                    parameter.zero_()
    load_lora_adapter(staged, tmp_path / "staged")
    for part in (first, second):
        assert all(torch.equal(p, before[n]) for n, p in part.named_parameters())


def _stage(model: torch.nn.Module, keep: str) -> torch.nn.Module:
    """The model with only this child, and a record of only its adapters."""
    for name, _ in list(model.named_children()):
        if name != keep:
            setattr(model, name, None)
    record = model.lora
    matched = {f: hf for f, hf in record.matched.items() if f.split(".")[0] == keep}
    model.lora = type(record)(
        config=record.config,
        matched=type(record.matched)(matched),
        module_names=tuple(matched.values()),
        hf_names=record.hf_names,
    )
    return model
