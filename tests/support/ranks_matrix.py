"""One run on every layout of ranks: trained and saved; restored on another, saved, continued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from archon_lora.config import LoRAConfig
from archon_lora.engine import ArchonEngine, EngineConfig, OptimizerConfig
from archon_lora.models.parallel_dims import ParallelDims
from ckpt import AdapterExport, CheckpointManager, TensorRule, TrainState
from support.engines import batch_of, masked_loss, masked_tokens, my_rows

ADAM = OptimizerConfig(lr=1e-2, eps=1e-3, schedule="cosine", warmup_steps=1, total_steps=9)
"""Where a gradient is all but zero, a smaller eps makes its last bit a whole step."""
LORA = LoRAConfig(rank=2, alpha=4.0)
ROWS, TOKENS, VOCAB = 8, 6, 40
TRAINED, MORE = 3, 2


@dataclass(frozen=True)
class Job:
    """What one engine does.

    Attributes:
        path: the model.
        dims: the layout.
        source: root to restore from; None starts afresh and trains.
        root: root to save into.
    """

    path: str
    dims: ParallelDims
    source: str | None
    root: str


def make(job: Job) -> ArchonEngine:
    config = EngineConfig(
        path=job.path,
        lora=LORA,
        optimizer=ADAM,
        parallel=job.dims,
        micro_batches=job.dims.pp,
        device="cpu",
    )
    engine = ArchonEngine(config)
    engine.initialize()
    return engine


def train(engine: ArchonEngine, first: int, steps: int) -> list[dict[str, float]]:
    """Updates on batches that depend on the step alone, shared out over the ranks."""
    done = []
    for step in range(first, first + steps):
        batch = batch_of(ROWS, TOKENS, seed=step)
        batch["input_ids"] %= VOCAB
        mine = my_rows(batch, engine.dp_rank, engine.dp_size)
        done.append(engine.train_batch(mine, masked_loss, loss_weight_fn=masked_tokens))
    return done


def work(job: Job) -> dict[str, Any]:
    """Train or restore; save and publish; go on. What a save cost this rank comes along."""
    with make(job) as engine:
        found: dict[str, Any] = {}
        group = engine.cpu_group
        if job.source is None:
            found["trained"] = train(engine, 0, TRAINED)
            engine.set_version(TRAINED)
        else:
            with CheckpointManager(job.source, process_group=group) as manager:
                found["start"] = manager.restore(engine.train_state())
        found["version"] = engine.get_version()
        state = engine.train_state()
        with CheckpointManager(
            job.root, process_group=group, publish_dtype="float32", fresh=True
        ) as manager:
            handle = manager.save(TRAINED, state, publish=True)
            handle.wait(60)
        with torch.no_grad():
            local = [
                t.to_local() if isinstance(t, DTensor) else t for t in state.live().tensors.values()
            ]
        found["held"] = sum(t.numel() * t.element_size() for t in local)
        found["staged"] = handle.metrics.stage_bytes
        found["requests"] = handle.metrics.store_requests
        found["next"] = train(engine, TRAINED, MORE)
        return found


def works(rank: int, world: int, jobs: dict[str, Job]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, job in jobs.items():
        found[name] = work(job)
        dist.barrier()
    return found


MATRICES, SIDE = 24, 512
"""Adapter and moments of 3 x 24 MiB."""


def growth(rank: int, world: int, root: str) -> dict[str, int]:
    """Bytes by which a rank's memory grows at most while a state is saved, published, restored.

    Every rank holds a ``world``-th of each of many tensors.
    """
    mesh = init_device_mesh("cpu", (world,))
    model = nn.Module()
    for number in range(MATRICES):
        local = torch.full((SIDE // world, SIDE), float(rank))
        parameter = nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)], run_check=False))
        model.register_parameter(f"m{number}_a", parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    rules = tuple(
        TensorRule(f"m{n}_a", f"base_model.model.l.{n // 2}.lin.lora_{'BA'[n % 2]}.weight")
        for n in range(MATRICES)
    )
    config = {"peft_type": "LORA", "r": SIDE, "lora_alpha": SIDE, "target_modules": ["lin"]}
    state = TrainState(model, optimizer, export=AdapterExport({**config, "bias": "none"}, rules))
    _warm_up(f"{root}/first")
    found = {"whole": MATRICES * SIDE * SIDE * 4, "whole state": 3 * MATRICES * SIDE * SIDE * 4}
    with CheckpointManager(root, publish_dtype="float32") as manager:
        before = _peak_from_now()
        manager.save(0, state).wait(60)
        found["save"] = _status("VmHWM") - before
        before = _peak_from_now()
        manager.publish(state).wait(60)
        found["publish"] = _status("VmHWM") - before
        before = _peak_from_now()
        manager.restore(state)
        found["restore"] = _status("VmHWM") - before
    return found


def _warm_up(root: str) -> None:
    """What is imported, pooled and connected once is not what is measured."""
    model = nn.Linear(2, 2)
    rules = (
        TensorRule("weight", "base_model.model.lin.lora_A.weight"),
        TensorRule("bias", "base_model.model.lin.lora_B.weight"),
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["lin"]}
    state = TrainState(model, torch.optim.AdamW(model.parameters()))
    with CheckpointManager(root) as manager:
        manager.save(0, state).wait(60)
        manager.restore(state)
    assert AdapterExport(config, rules).rules


def _peak_from_now() -> int:
    """Let the peak start again at what is used now, and tell that."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def on_four(
    rank: int, world: int, jobs: dict[str, Job], root: str
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    return works(rank, world, jobs), growth(rank, world, root)
