"""Warm starts over ranks: sharded by rows, by columns, and what happens when one rank refuses."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import ckpt
import ckpt.restore
import ckpt.takeover
from ckpt import CheckpointManager, CkptError, TrainState
from ckpt.storage import open_storage
from support.tiny_run import EXPORT, Tiny, whole


def build(kind: str, world: int, rows: int = 5, columns: int = 6) -> nn.Module:
    """An adapter of rank 3 under FSDP, or with both factors split by columns."""
    model = Tiny(seed=3)
    if (rows, columns) != (5, 6):
        model.base = nn.Parameter(torch.zeros(1), requires_grad=False)
        model.a = nn.Parameter(torch.zeros(3, columns))
        model.b = nn.Parameter(torch.zeros(rows, 3))
    mesh = init_device_mesh("cpu", (world,))
    if kind == "fsdp":
        fully_shard(model, mesh=mesh)
        return model
    for name in ("a", "b"):
        value = distribute_tensor(getattr(model, name).detach(), mesh, [Shard(1)])
        setattr(model, name, nn.Parameter(value))
    return model


def values(model: nn.Module) -> list[list[float]]:
    return [whole(tensor.detach()).flatten().tolist() for tensor in (model.a, model.b)]


def warm(rank: int, world: int, urls: dict[str, str]) -> dict[str, list[list[float]]]:
    """The whole factors after a warm start, under each kind, from each directory."""
    found = {}
    for name, url in urls.items():
        for kind in ("fsdp", "columns"):
            model = build(kind, world)
            ckpt.warm_start(TrainState(model, export=EXPORT), url, timeout=20)
            found[f"{name} {kind}"] = values(model)
    return found


def refuse(rank: int, world: int, directory: str, root: str) -> dict[str, list[str]]:
    """What each rank hears when something is wrong on one of them; nothing may change."""
    found = {}
    with CheckpointManager(root, vote_timeout=5) as manager:
        for way in ("model", "url", "surplus", "nan in one shard"):
            model = build("fsdp", world)
            if way == "model" and rank == 1:
                model.register_parameter("head", nn.Parameter(torch.zeros(2)))
            url = Path(directory, way if way in ("surplus", "nan in one shard") else "good")
            if way == "url" and rank == 1:
                url = Path(directory, "surplus")
            before = [p.to_local().clone() for p in (model.a, model.b)]
            try:
                manager.warm_start(TrainState(model, export=EXPORT), url)
            except CkptError as error:
                found[way] = [type(error).__name__, str(error)]
            assert all(map(torch.equal, before, (model.a.to_local(), model.b.to_local()))), way
        model = build("fsdp", world)
        manager.warm_start(TrainState(model, export=EXPORT), Path(directory, "good"))
    dist.barrier()
    return found


def die_while_staging(rank: int, world: int, root: str, url: str, victim: int) -> list[str]:
    """One rank is killed while it reads; what the other hears, how soon, and that nothing moved.

    With the first rank goes the ranks' store, so the other hears at once; else rank 0 gives up.
    """
    model = build("fsdp", world)
    state = TrainState(model, export=EXPORT)
    manager = CheckpointManager(root, vote_timeout=1)
    manager.save(0, state).wait(20)
    before = [p.to_local().clone() for p in (model.a, model.b)]
    dist.barrier()
    if rank == victim:

        def die(*_args: object, **_more: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        ckpt.restore.fetch = ckpt.takeover.adapter_values = die  # type: ignore[assignment]
    began = time.monotonic()
    try:
        if victim == 1:
            manager.restore(state, parts={"model"})
        else:
            manager.warm_start(state, url)
    except CkptError as error:
        assert time.monotonic() - began < 15
        assert all(map(torch.equal, before, (model.a.to_local(), model.b.to_local())))
        return [type(error).__name__, str(error)]
    return []


def received(rank: int, world: int, url: str, rows: int, columns: int) -> int:
    """Bytes that this rank took from the store."""
    model = build("fsdp", world, rows, columns)
    stores = []

    def opened(*args: object) -> object:
        stores.append(open_storage(*args))  # type: ignore[arg-type]
        return stores[-1]

    ckpt.takeover.open_storage = opened  # type: ignore[assignment]
    ckpt.warm_start(TrainState(model, export=EXPORT), url, timeout=20)
    assert bool((whole(model.b.detach()) == 1.5).all())
    (store,) = stores
    return store.traffic.received
