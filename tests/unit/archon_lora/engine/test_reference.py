"""The reference: the bare base, or the adapter that the policy began with, for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.engines import batch_of, moved, train

from archon_lora import NoAdapterError, adapter_mode, get_adapter_params
from archon_lora.engine import (
    SaveLoadMeta,
    keep_reference,
    load_lora_adapter,
    save_lora_adapter,
    warm_start,
)
from archon_lora.errors import EngineNotReady
from ckpt.errors import StateError


@pytest.fixture
def start(engine_of, tmp_path: Path) -> str:
    """An adapter to begin with."""
    source = moved(engine_of(optimizer=None))
    save_lora_adapter(source, tmp_path / "start", base_model_path=source.base_name)
    return str(tmp_path / "start")


def test_the_reference_is_the_warm_start_and_stays_so(engine_of, start: str) -> None:
    batch = batch_of()
    engine = engine_of(reference="warm-start")
    base = engine.logprobs(batch)
    warm_start(engine, start)
    begun = engine.logprobs(batch)
    assert not torch.allclose(begun, base)
    assert torch.equal(engine.logprobs(batch, reference=True), begun)
    train(engine, 3)
    assert not torch.allclose(engine.logprobs(batch), begun)
    assert torch.equal(engine.logprobs(batch, reference=True), begun)
    plain = engine_of()
    warm_start(plain, start)
    assert torch.equal(plain.logprobs(batch, reference=True), base)
    assert train(plain, 3) == train_again(engine_of, start)  # the slot changes no number


def train_again(engine_of, start: str) -> list[dict[str, float]]:
    engine = engine_of(reference="warm-start")
    warm_start(engine, start)
    return train(engine, 3)


@pytest.mark.parametrize("weight_format", ["hf", "dcp"])
def test_a_resume_keeps_the_reference_and_goes_on_exactly(
    engine_of, start: str, tmp_path: Path, weight_format: str
) -> None:
    meta = SaveLoadMeta(path=str(tmp_path / "saved"), with_optim=True, weight_format=weight_format)
    engine = engine_of(reference="warm-start")
    warm_start(engine, start)
    train(engine, 2)
    engine.save(meta)
    wanted = engine.logprobs(batch_of(), reference=True)
    going_on = train(engine, 2)
    again = engine_of(reference="warm-start")
    with pytest.raises(EngineNotReady, match=r"no adapter was kept.*keep_reference\(engine\)"):
        again.logprobs(batch_of(), reference=True)
    again.load(meta)
    assert torch.equal(again.logprobs(batch_of(), reference=True), wanted)
    assert train(again, 2) == going_on
    without = engine_of()
    with pytest.raises(StateError, match=r"adapters\.reference\."):
        without.load(meta)


def test_the_optimizer_and_the_weights_file_have_the_policy_alone(
    engine_of, start: str, tmp_path: Path
) -> None:
    engine, plain = engine_of(reference="warm-start"), engine_of()
    held = [p for group in engine.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(get_adapter_params(plain.model))
    for one in (engine, plain):
        warm_start(one, start)
        save_lora_adapter(one, tmp_path / str(one is plain))
    first, second = (tmp_path / name / "adapter_model.safetensors" for name in ("True", "False"))
    assert first.read_bytes() == second.read_bytes()


def test_the_reference_can_be_saved_and_loaded_by_its_name(
    engine_of, start: str, tmp_path: Path
) -> None:
    engine = engine_of(reference="warm-start")
    warm_start(engine, start)
    train(engine, 1)
    save_lora_adapter(engine, tmp_path / "kept", adapter="reference")
    kept, begun = (Path(p, "adapter_model.safetensors") for p in (tmp_path / "kept", start))
    assert kept.read_bytes() == begun.read_bytes()
    other = engine_of(reference="warm-start")
    load_lora_adapter(other, tmp_path / "kept", adapter="reference")
    with adapter_mode(other.model, "reference"):
        loaded = other.logprobs(batch_of())
    assert torch.equal(loaded, engine.logprobs(batch_of(), reference=True))
    assert torch.equal(other.logprobs(batch_of()), engine_of().logprobs(batch_of()))
    with pytest.raises(NoAdapterError, match="no adapter 'nobody'; it has 'default', 'reference'"):
        save_lora_adapter(engine, tmp_path / "none", adapter="nobody")


def test_any_moment_s_adapter_can_be_kept(engine_of) -> None:
    engine = moved(engine_of(reference="warm-start"))
    keep_reference(engine)
    now = engine.logprobs(batch_of())
    train(engine, 1)
    assert torch.equal(engine.logprobs(batch_of(), reference=True), now)
    with pytest.raises(EngineNotReady, match="reference='warm-start'"):
        keep_reference(engine_of())


def test_the_reference_needs_lora(engine_of) -> None:
    with pytest.raises(ValueError, match="reference must be 'base' without lora"):
        engine_of(lora=None, reference="warm-start")
    with pytest.raises(ValueError, match="reference must be one of base, warm-start"):
        engine_of(reference="policy")
