"""Engines on every layout: what each saves, loads, computes and hands over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from archon_lora.config import LoRAConfig
from archon_lora.engine import (
    ArchonEngine,
    OptimizerConfig,
    SaveLoadMeta,
    save_lora_adapter,
    warm_start,
)
from archon_lora.models.parallel_dims import ParallelDims
from archon_lora.rl.build import build_engine, build_manager
from archon_lora.rl.config import TrainConfig, load_config
from archon_lora.rl.loop import Run
from support.engines import batch_of, make_engine, masked_loss, moved, my_rows, train, weights_of
from support.engines import whole as whole_tensor
from support.ranks_engine import RecordingSink
from support.ranks_models import logged_reads

ADAM = OptimizerConfig(lr=1e-2, eps=1e-3, schedule="cosine", warmup_steps=1, total_steps=9)


@dataclasses.dataclass(frozen=True)
class Job:
    """What one engine does.

    Attributes:
        path: the model.
        dims: the layout.
        lora: None for a whole model.
        load: the directory to load from, weights and optimizer; None starts afresh.
        out: the directory to save to.
    """

    path: str
    dims: ParallelDims
    lora: LoRAConfig | None
    load: str | None
    out: str


def work(job: Job) -> dict[str, Any]:
    """Train two steps or load, look, save all kinds of things, and go on."""
    with logged_reads() as log:
        engine = make_engine(
            job.path, lora=job.lora, parallel=job.dims, optimizer=ADAM, micro_batches=2
        )
    with engine:
        found: dict[str, Any] = {"read": log.total}
        if job.load is None:
            if job.lora is not None:
                moved(engine)
            found["first"] = train(engine, 2, rows=8)
            engine.set_version(2)
        else:
            engine.load(SaveLoadMeta(path=job.load, with_optim=True))
        found["version"] = engine.get_version()
        found["weights"] = weights_of(engine, trainable=True)
        found["moments"] = {
            f"{index}.{key}": whole_tensor(value)
            for index, param in enumerate(engine.trainable_params())
            for key, value in engine.optimizer.state[param].items()
        }
        found["logprobs"] = engine.logprobs(batch_of(2))
        if job.lora is not None:
            found["reference"] = engine.logprobs(batch_of(2), reference=True)
            save_lora_adapter(engine, f"{job.out}/adapter", "base")
            sink = RecordingSink()
            engine.sinks.append(sink)
            engine.update_weights(3)
            engine.set_version(2)
            found["served"] = sink.calls
        engine.save(SaveLoadMeta(path=f"{job.out}/whole", with_optim=True, base_model_path="base"))
        found["next"] = train(engine, 2, first=2, rows=8)
        found["dp"] = (engine.dp_rank, engine.dp_size)
        return found


def jobs(rank: int, world: int, todo: dict[str, Job]) -> dict[str, dict[str, Any]]:
    """One after another, since later ones load what earlier ones saved."""
    return {name: work(job) for name, job in todo.items()}


def misfits(rank: int, world: int, path: str) -> dict[str, str]:
    """What an engine refuses about a layout."""
    said = {}
    with make_engine(path, parallel=ParallelDims(tp=2)) as engine:
        by_rank = my_rows(batch_of(4), rank, world)
        said["rows"] = _message(engine, by_rank)
        train(engine, 1)
    for name, dims in {"world": ParallelDims(tp=3), "ep": ParallelDims(ep=2)}.items():
        try:
            make_engine(path, parallel=dims)
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def _message(engine: ArchonEngine, batch: dict[str, torch.Tensor]) -> str:
    try:
        engine.train_batch(batch, masked_loss)
    except ValueError as error:
        return str(error)
    return "accepted"


def reinforce(config: TrainConfig) -> None:
    """What ``archon-lora train`` does, in the process group that is there."""
    engine = build_engine(config)
    engine.initialize()
    run = Run(config, engine, build_manager(config))
    try:
        run.restore()
        run.train()
    finally:
        run.rollouts.close()
        engine.close()


def started(first: Job) -> dict[str, Any]:
    """A policy that begins with an adapter, and is held against it, on split layers."""
    dims = ParallelDims(tp=2, sequence_parallel=True)
    options = {"lora": first.lora, "parallel": dims, "reference": "warm-start"}
    with make_engine(first.path, **options) as engine:
        warm_start(engine, f"{first.out}/adapter", any_base=True)
        weights = weights_of(engine, trainable=True)
        begun = engine.logprobs(batch_of(2), reference=True)
        train(engine, 2)
        return {
            "weights": weights,
            "policy": engine.logprobs(batch_of(2)),
            "begun": begun,
            "reference": engine.logprobs(batch_of(2), reference=True),
        }


def several(
    rank: int, world: int, path: str, todo: dict[str, Job], config: str, overrides: list[str]
) -> dict[str, Any]:
    found = {"jobs": jobs(rank, world, todo), "misfits": misfits(rank, world, path)}
    first = next(job for job in todo.values() if job.lora is not None)
    found["started"] = started(first)
    reinforce(load_config(Path(config), overrides))
    return found
