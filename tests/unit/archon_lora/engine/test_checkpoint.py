"""What save(meta) and load(meta) write and read, by format and by whether LoRA is on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from support.engines import batch_of, moved, names_in, train, weights_of

from archon_lora.config import LoRAConfig
from archon_lora.engine import OptimizerConfig, SaveLoadMeta, is_lora_adapter_checkpoint
from archon_lora.errors import AdapterNotFound, LoRANotEnabled
from ckpt.errors import NoCheckpoint, StateError

DECAY = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=1, total_steps=12)
DROPOUT = LoRAConfig(rank=4, alpha=8.0, dropout=0.3)


def _same(first, second) -> bool:
    a, b = weights_of(first), weights_of(second)
    return all(torch.equal(a[name], b[name]) for name in a)


class Tokenizer:
    def save_pretrained(self, save_directory: str) -> None:
        Path(save_directory, "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("lora", [DROPOUT, None], ids=["lora", "full"])
@pytest.mark.parametrize("weight_format", ["hf", "dcp"])
def test_training_goes_on_bit_for_bit(engine_of, tmp_path, lora, weight_format) -> None:
    meta = SaveLoadMeta(path=tmp_path / "c", weight_format=weight_format, with_optim=True)
    engine = engine_of(lora=lora, optimizer=DECAY)
    train(engine, 3)
    engine.set_version(3)
    engine.save(meta)
    wanted = train(engine, 3, first=3), random.random()
    other = engine_of(lora=lora, optimizer=DECAY, seed=5)
    other.load(meta)
    assert other.get_version() == 3
    assert (train(other, 3, first=3), random.random()) == wanted
    assert _same(engine, other)


@pytest.mark.parametrize(
    ("lora", "weight_format", "with_optim", "names"),
    [
        (DROPOUT, "hf", False, ["adapter_config.json", "adapter_model.safetensors"]),
        (
            DROPOUT,
            "hf",
            True,
            ["adapter_config.json", "adapter_model.safetensors", "train_state"],
        ),
        (DROPOUT, "dcp", True, ["train_state"]),
        (DROPOUT, "dcp", False, ["train_state"]),
        (None, "hf", False, ["config.json", "model.safetensors"]),
        (None, "hf", True, ["config.json", "model.safetensors", "train_state"]),
        (None, "dcp", True, ["train_state"]),
    ],
)
def test_what_is_written(engine_of, tmp_path, lora, weight_format, with_optim, names) -> None:
    meta = SaveLoadMeta(path=tmp_path, weight_format=weight_format, with_optim=with_optim)
    engine = engine_of(lora=lora)
    train(engine, 1)
    engine.save(meta)
    assert names_in(tmp_path) == names
    assert is_lora_adapter_checkpoint(tmp_path) == ("adapter_config.json" in names)
    other = engine_of(lora=lora)
    other.load(meta)
    assert _same(engine, other)
    # Moments come along exactly when they were asked for.
    assert bool(other.optimizer.state) == with_optim


def test_tokenizer_and_processor_are_saved_beside(engine_of, tmp_path) -> None:
    engine_of().save(SaveLoadMeta(path=tmp_path, tokenizer=Tokenizer()))
    assert "tokenizer.json" in names_in(tmp_path)


def test_a_second_save_replaces_the_first(engine_of, tmp_path) -> None:
    meta = SaveLoadMeta(path=tmp_path, with_optim=True)
    engine = engine_of(optimizer=DECAY)
    for _ in range(3):
        train(engine, 1)
        engine.save(meta)
    assert names_in(tmp_path / "train_state") == ["save-000003"]
    other = engine_of(optimizer=DECAY)
    other.load(meta)
    assert train(other, 2) == train(engine, 2)


def test_a_save_that_never_committed_is_passed_over(engine_of, tmp_path) -> None:
    meta = SaveLoadMeta(path=tmp_path, with_optim=True)
    engine = engine_of()
    train(engine, 1)
    engine.save(meta)
    # What a crash in the middle of the next save leaves behind.
    (tmp_path / "train_state" / "save-000002" / "steps" / ".tmp-x").mkdir(parents=True)
    other = engine_of()
    other.load(meta)
    assert _same(engine, other)
    engine.save(meta)
    assert names_in(tmp_path / "train_state") == ["save-000003"]


def test_of_two_committed_saves_the_newer_one_counts(engine_of, tmp_path) -> None:
    meta = SaveLoadMeta(path=tmp_path, with_optim=True)
    engine = engine_of()
    train(engine, 1)
    engine.save(meta)
    # A crash between the commit of the second and the deletion of the first leaves both.
    shutil.copytree(tmp_path / "train_state" / "save-000001", tmp_path / "first")
    train(engine, 1)
    engine.save(meta)
    (tmp_path / "first").rename(tmp_path / "train_state" / "save-000001")
    assert names_in(tmp_path / "train_state") == ["save-000001", "save-000002"]
    other = engine_of()
    other.load(meta)
    assert _same(engine, other)


def test_weights_do_not_go_over_someone_s_optimizer_state(engine_of, tmp_path) -> None:
    engine = engine_of()
    train(engine, 1)
    engine.save(SaveLoadMeta(path=tmp_path, with_optim=True))
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    train(engine, 1)
    with pytest.raises(StateError, match="would not belong to these weights: set with_optim=true"):
        engine.save(SaveLoadMeta(path=tmp_path))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_optimizer_state_that_is_not_there_is_an_error(engine_of, tmp_path) -> None:
    engine = moved(engine_of())
    engine.save(SaveLoadMeta(path=tmp_path))
    for meta in (
        SaveLoadMeta(path=tmp_path, with_optim=True),
        SaveLoadMeta(path=tmp_path, weight_format="dcp"),
    ):
        with pytest.raises(NoCheckpoint, match="load with with_optim=False"):
            engine.load(meta)


def test_a_checkpoint_with_optimizer_is_not_half_loaded(engine_of, tmp_path) -> None:
    engine = engine_of()
    train(engine, 1)
    engine.save(SaveLoadMeta(path=tmp_path, weight_format="dcp", with_optim=True))
    other = engine_of()
    before = weights_of(other)
    with pytest.raises(StateError, match=r"optimizer.*with_optim=False here must be as"):
        other.load(SaveLoadMeta(path=tmp_path, weight_format="dcp"))
    after = weights_of(other)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_lora_never_falls_through_to_a_whole_model(engine_of, tmp_path) -> None:
    engine_of(lora=None).save(SaveLoadMeta(path=tmp_path))
    engine = moved(engine_of())
    before = weights_of(engine)
    with pytest.raises(AdapterNotFound, match=r"it holds config\.json, model\.safetensors"):
        engine.load(SaveLoadMeta(path=tmp_path))
    after = weights_of(engine)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_adapter_is_not_taken_for_a_model(engine_of, tmp_path) -> None:
    engine_of().save(SaveLoadMeta(path=tmp_path))
    with pytest.raises(LoRANotEnabled, match=r"holds a LoRA adapter, but .* set use_lora=true"):
        engine_of(lora=None).load(SaveLoadMeta(path=tmp_path))


def test_saved_under_the_name_that_is_set(engine_of, tmp_path) -> None:
    engine = engine_of(base_name="org/base")
    engine.save(SaveLoadMeta(path=tmp_path / "a"))
    engine.save(SaveLoadMeta(path=tmp_path / "b", base_model_path="org/other"))
    for name, wanted in (("a", "org/base"), ("b", "org/other")):
        assert (
            f'"base_model_name_or_path": "{wanted}"'
            in (tmp_path / name / "adapter_config.json").read_text()
        )
    assert engine.train_state().base.name == "org/base"
    published = engine.train_state().export()
    assert published.peft_config["base_model_name_or_path"] == "org/base"
    assert engine.logprobs(batch_of()).shape == (4, 7)
