"""What the ranks of the expert parallelism tests do."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from archon_lora.engine import load_lora_adapter, save_lora_adapter
from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims, build_mesh
from archon_lora.models.qwen3_moe import SPEC, Qwen3MoeModel
from ckpt import CheckpointManager, Retention
from support import engines as tiny
from support.engines import make_engine
from support.moe import CONFIG, LORA, ROWS, TOKENS, Run


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


def engines(
    rank: int, world: int, directory: str, layouts: list[ParallelDims | None], out: str
) -> list[dict[str, Any]]:
    """Two updates by the engine under each layout, and the adapter that it writes."""
    results = []
    for number, dims in enumerate(layouts):
        target = Path(out) / f"{world}-{number}"
        options: dict[str, Any] = {} if dims is None else {"parallel": dims}
        if dims is not None and dims.pp > 1:
            options["micro_batches"] = 2
        with make_engine(directory, lora=LORA, **options) as engine:
            done = tiny.train(engine, 2)
            save_lora_adapter(engine, target / "single")
            save_lora_adapter(engine, target / "stacked", experts="stacked")
        results.append({"done": done, "target": str(target)})
        with make_engine(directory, lora=LORA, **options) as engine:
            load_lora_adapter(engine, target / "single")
            save_lora_adapter(engine, target / "again")
    return results
