"""What the ranks of the expert parallelism tests do."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims, build_mesh
from archon_lora.models.qwen3_moe import SPEC, Qwen3MoeModel
from ckpt import CheckpointManager, Retention
from support.moe import CONFIG, ROWS, TOKENS, Run


def train(rank: int, world: int, directory: str, dims: ParallelDims) -> dict[str, Any]:
    """Two steps from the start, then one on rows whose experts lie on one rank."""
    run = Run(directory, dims)
    result: dict[str, Any] = {"placements": run.placements(), "bytes": run.loaded.bytes_read}
    result["initial"] = run.adapter()
    result["losses"] = [run.step(), run.step()]
    # One token everywhere: all rows of a layer want the same experts, and other ranks have none.
    result["losses"].append(run.step(lonely()))
    result["adapter"] = run.adapter()
    result["refused"] = [_refused(dims, **changes) for changes in UNFIT]
    return result


def lonely() -> torch.Tensor:
    return torch.full((ROWS, TOKENS), 3)


UNFIT: list[dict[str, Any]] = [{"num_experts": 5}, {"mlp_only_layers": (0, 1)}]


def _refused(dims: ParallelDims, **changes: Any) -> str:
    with torch.device("meta"):
        model = Qwen3MoeModel(dataclasses.replace(CONFIG, **changes))
    with pytest.raises(ParallelConfigError) as caught:
        SPEC.parallelize_fn(model, build_mesh(dims, "cpu"))
    return str(caught.value)


def carry_on(
    rank: int, world: int, directory: str, layouts: list[ParallelDims | None], root: str, first: int
) -> list[dict[str, Any]]:
    """Restore the newest step under each layout in turn, save it as it is, and train on."""
    results = []
    for number, dims in enumerate(layouts):
        run = Run(directory, dims)
        with CheckpointManager(root, retention=Retention(latest=20)) as manager:
            manager.restore(run.state())
            restored = run.digest()
            manager.save(first + number, run.state()).wait()
        run.steps = 2
        results.append({"restored": restored, "loss": run.step()})
    return results
