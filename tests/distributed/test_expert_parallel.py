"""Experts shared out over ranks: the same training as on one rank, and checkpoints that move."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ranks_moe
from support.moe import EXPERTS, Run, write_moe
from support.spawn import run_ranks

from archon_lora.models.parallel_dims import ParallelDims
from ckpt import CheckpointManager, Retention
from ckpt.consolidate import consolidate

pytestmark = pytest.mark.dist

TOLERANCE = 2e-6
FULL = os.environ.get("ARCHON_LAYOUTS") == "full"
LAYOUTS = {"ep2-fsdp2": (4, ParallelDims(ep=2))}
if FULL:
    LAYOUTS |= {
        "ep2": (2, ParallelDims(ep=2)),
        "hsdp2-ep2": (4, ParallelDims(dp_replicate=2, ep=2)),
        "ep3": (3, ParallelDims(ep=3)),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_moe(tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture(scope="module")
def alone(directory) -> dict[str, object]:
    """One rank without any sharding."""
    run = Run(str(directory), None)
    result: dict[str, object] = {"initial": run.adapter()}
    losses = [run.step(), run.step()]
    losses.append(run.step(ranks_moe.lonely()))
    return {**result, "losses": losses, "adapter": run.adapter(), "bytes": run.loaded.bytes_read}


@pytest.mark.parametrize(("world", "dims"), LAYOUTS.values(), ids=LAYOUTS)
def test_training_is_that_of_one_rank(directory, alone, world, dims):
    ranks = run_ranks(world, ranks_moe.train, str(directory), dims)
    for rank in ranks:
        torch.testing.assert_close(rank["losses"], alone["losses"], rtol=1e-6, atol=TOLERANCE)
        assert rank["adapter"].keys() == alone["adapter"].keys()
        for name, value in alone["adapter"].items():
            assert torch.equal(rank["initial"][name], alone["initial"][name]), name
            torch.testing.assert_close(rank["adapter"][name], value, rtol=0, atol=1e-5)
            assert not torch.equal(value, alone["initial"][name]), f"{name} did not train"
    # Every expert on one rank of each copy, frozen stacks and adapters alike.
    for name in ("layers.1.moe.experts.w1", "layers.1.moe.experts.w2_lora_b"):
        held = [rank["placements"][name][0][0] for rank in ranks]
        assert sum(held) == EXPERTS * dims.dp_replicate
        assert max(held) <= EXPERTS // dims.ep
    for rank in ranks:
        assert rank["refused"] == [
            f"ep={dims.ep} does not divide the 5 experts of a layer",
            f"ep={dims.ep}, but the model has no experts; set ep to 1",
        ]
    # What a rank does not hold of the experts it does not read from the files either.
    experts = 2 * 3 * EXPERTS * 8 * 16 * 4
    for rank in ranks:
        held = rank["placements"]["layers.0.moe.experts.w1"][0][0]
        assert rank["bytes"] <= alone["bytes"] - experts * (EXPERTS - held) // EXPERTS


def test_a_checkpoint_moves_between_layouts_bit_for_bit(directory, tmp_path):
    run, root = Run(str(directory), None), str(tmp_path / "run")
    run.step(), run.keep_reference(), run.step()
    saved = run.digest()
    assert "model.layers.0.moe.experts.adapters.reference.w1_lora_a" in saved
    assert any("exp_avg" in name and "experts" in name for name in saved)
    with CheckpointManager(root, retention=Retention(latest=20)) as manager:
        manager.restore(run.state())
        manager.save(0, run.state()).wait()
    loss = run.step()

    two, four = [ParallelDims(ep=2), ParallelDims()], [ParallelDims(ep=2)]
    seen = run_ranks(2, ranks_moe.carry_on, str(directory), two, root, 1)[0]
    seen += run_ranks(4, ranks_moe.carry_on, str(directory), four, root, 3)[0]
    seen += ranks_moe.carry_on(0, 1, str(directory), [None], root, 4)
    assert [entry["restored"] == saved for entry in seen] == [True] * 4
    for entry in seen:
        torch.testing.assert_close(entry["loss"], loss, rtol=1e-6, atol=TOLERANCE)

    exported = set()
    for step in range(5):
        out = tmp_path / f"step-{step}"
        consolidate(root, step, out)
        exported.add(hashlib.sha256((out / "adapter_model.safetensors").read_bytes()).hexdigest())
    assert len(exported) == 1


def test_the_engine_trains_experts_under_every_layout(directory, tmp_path):
    """Expert, tensor and pipeline parallelism, and pairs of them."""
    alone = ranks_moe.engines(0, 1, str(directory), [None], str(tmp_path))[0]
    two = [ParallelDims(ep=2)]
    four = [ParallelDims(tp=2, ep=2, sequence_parallel=True)]
    if FULL:
        two += [ParallelDims(tp=2), ParallelDims(pp=2)]
        four += [ParallelDims(ep=2), ParallelDims(pp=2, ep=2), ParallelDims(tp=2, ep=2)]
    seen = run_ranks(2, ranks_moe.engines, str(directory), two, str(tmp_path), timeout=240)[0]
    seen += run_ranks(4, ranks_moe.engines, str(directory), four, str(tmp_path), timeout=240)[0]
    weights = "adapter_model.safetensors"
    for found in seen:
        for ours, wanted in zip(found["done"], alone["done"], strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        for form in ("single", "stacked"):
            values = load_file(Path(alone["target"]) / form / weights)
            written = load_file(Path(found["target"]) / form / weights)
            assert written.keys() == values.keys()
            for name, value in values.items():
                torch.testing.assert_close(written[name], value, rtol=0, atol=1e-5, msg=name)
        target = Path(found["target"])
        # Loaded and saved under the layout: the same bytes.
        assert (target / "again" / weights).read_bytes() == (
            target / "single" / weights
        ).read_bytes()
