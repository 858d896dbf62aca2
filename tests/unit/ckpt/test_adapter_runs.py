"""Runs of an adapter's tensors, and the order of a snapshot that makes them long."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.steps import tiny_adapter
from torch import nn

from ckpt import AdapterExport, CheckpointManager, TensorRule, TrainState
from ckpt.adapter_plan import PlannedTensor, plan_adapter
from ckpt.adapter_runs import Run, runs
from ckpt.arena import Slot
from ckpt.consolidate import stream_adapter
from ckpt.errors import NonFiniteError
from ckpt.memory import bytes_of
from ckpt.plan import adapter_first, local_pieces, shard_layout, tensor_records
from ckpt.slot_source import SlotSource


def snapshot(dtype: torch.dtype, *, scaled: bool, ordered: bool = True):
    """A slot with a whole adapter and its optimizer state, as a save of one rank makes it."""
    tensors, export = tiny_adapter(rank=16)  # so that all sizes are multiples of the alignment
    if not scaled:
        export = replace(export, rules=tuple(replace(rule, scale=1.0) for rule in export.rules))
    export = replace(export, rules=tuple(replace(rule, pad_to=None) for rule in export.rules))
    tensors = {
        name: tensor.to(dtype) if name.startswith("model.") else tensor
        for name, tensor in tensors.items()
    }
    pieces = adapter_first(local_pieces(tensors), export if ordered else None)
    layout = shard_layout(pieces)
    slot = Slot(layout, pieces, pinned=False)
    slot.fill([tensors[piece.name] for piece in pieces], None)
    records = tensor_records(pieces, [pieces])
    return SlotSource(records, slot, "0", None), export, tensors, slot


def test_a_whole_adapter_is_one_run_of_its_snapshot() -> None:
    source, export, _, _ = snapshot(torch.bfloat16, scaled=False)
    plan = plan_adapter(export, source.records, "bfloat16")
    (run,) = runs(plan.tensors)
    assert isinstance(run, Run)
    assert run.tensors == plan.tensors
    assert run.elements == sum(math.prod(tensor.shape) for tensor in plan.tensors)
    assert run.stays(torch.bfloat16)
    assert not run.stays(torch.float16)
    # In the state's own order it would be many.
    source, export, _, _ = snapshot(torch.bfloat16, scaled=False, ordered=False)
    assert len(list(runs(plan_adapter(export, source.records, "bfloat16").tensors))) > 1


def test_parts_of_a_piece_say_whose_elements_they_are() -> None:
    source, export, _, _ = snapshot(torch.float32, scaled=True)
    (run,) = runs(plan_adapter(export, source.records, "float32").tensors)
    owner = [i for i, tensor in enumerate(run.tensors) for _ in range(math.prod(tensor.shape))]
    for low, high in ((0, run.elements), (3, 4), (run.ends[0] - 1, run.ends[2] + 1), (5, 5)):
        found = []
        for tensor, place in run.parts(low, high):
            assert place.start == len(found)
            found += [run.tensors.index(tensor)] * (place.stop - place.start)
        assert found == owner[low:high]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("piece", [64, 4096, 1 << 22])
def test_pieces_of_any_size_give_the_same_file(
    stored: torch.dtype, scaled: bool, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, export, tensors, _ = snapshot(stored, scaled=scaled)
    plan = plan_adapter(export, source.records, "bfloat16")
    expected = [plan.header]
    for tensor in plan.tensors:
        value = tensors[tensor.record.name].float() * tensor.rule.scale
        expected.append(bytes(bytes_of(value.bfloat16().contiguous())))
    monkeypatch.setattr("ckpt.consolidate.PIECE_BYTES", piece)
    assert b"".join(stream_adapter(plan, source)) == b"".join(expected)


def test_an_unchanged_run_is_the_snapshots_own_memory() -> None:
    source, export, _, slot = snapshot(torch.bfloat16, scaled=False)
    plan = plan_adapter(export, source.records, "bfloat16")
    _header, data = stream_adapter(plan, source)
    before = bytes(slot.buffer())
    data[0] ^= 1
    assert bytes(slot.buffer()) != before


@pytest.mark.parametrize(("stored", "scaled"), [(torch.bfloat16, False), (torch.float32, True)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_in_the_middle_of_a_run_is_named_by_its_tensor(
    stored: torch.dtype, scaled: bool, value: float
) -> None:
    source, export, _, slot = snapshot(stored, scaled=scaled)
    plan = plan_adapter(export, source.records, "bfloat16")
    victim: PlannedTensor = plan.tensors[len(plan.tensors) // 2]
    (chunk,) = victim.record.chunks
    at = slot.buffer()[chunk.start : chunk.end]
    torch.frombuffer(at, dtype=stored)[-1] = value
    with pytest.raises(NonFiniteError, match=victim.rule.key):
        list(stream_adapter(plan, source))


def test_a_value_too_large_for_the_dtype_is_told_from_one_that_is_none() -> None:
    source, export, _, slot = snapshot(torch.float32, scaled=True)
    plan = plan_adapter(export, source.records, "float16")
    (chunk,) = plan.tensors[-1].record.chunks
    torch.frombuffer(slot.buffer()[chunk.start : chunk.end], dtype=torch.float32)[0] = 1e6
    with pytest.raises(NonFiniteError, match=r"does not fit torch\.float16"):
        list(stream_adapter(plan, source))


class Wide(nn.Module):
    """Adapters in an order that is not the file's, each a multiple of the alignment."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("wq", "wo"):
            layer = nn.Module()
            layer.lora_b = nn.Linear(16, 32, bias=False)
            layer.lora_a = nn.Linear(32, 16, bias=False)
            self.add_module(name, layer)


@pytest.mark.parametrize("with_step", [True, False])
def test_a_manager_publishes_in_one_run(
    with_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Wide()
    rules = tuple(
        TensorRule(
            f"{name}.lora_{side.lower()}.weight", f"base_model.model.{name}.lora_{side}.weight"
        )
        for name in ("wq", "wo")
        for side in "BA"
    )
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["wo", "wq"]}
    optimizer = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()
    optimizer.step()
    state = TrainState(model, optimizer, export=AdapterExport(config, rules))
    seen: list[Run | PlannedTensor] = []

    def spied(tensors):
        seen.extend(runs(tensors))
        return iter(seen)

    monkeypatch.setattr("ckpt.consolidate.runs", spied)
    with CheckpointManager(tmp_path) as manager:
        handle = manager.save(0, state, publish=True) if with_step else manager.publish(state)
        version = handle.published.result(60)
    (run,) = seen
    assert len(run.tensors) == 4
    file = load_file(tmp_path / "adapters" / version.name / "adapter_model.safetensors")
    for rule in rules:
        assert torch.equal(file[rule.key], model.get_parameter(rule.source).bfloat16())
