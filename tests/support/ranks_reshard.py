"""A model under FSDP2, tensor parallelism or both, saved under one and restored under another."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from ckpt import CheckpointManager, CkptError, Retention, TrainState
from support.tiny_run import whole


def build(kind: str, world: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """``plain``, ``fsdp``, ``tp`` or ``both`` (2 x 2); 7 rows do not split evenly."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 7))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif kind == "tp":
        parallelize_module(model, init_device_mesh("cpu", (world,)), plan)
    elif kind == "both":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def fill(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Two optimizer steps of an unsharded model, so that there is optimizer state to carry."""
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()


def digest(state: TrainState) -> dict[str, str]:
    with torch.no_grad():
        return {
            name: hashlib.sha256(whole(tensor).numpy().tobytes()).hexdigest()
            for name, tensor in state.live().tensors.items()
        }


def reshard(rank: int, world: int, root: str, kinds: list[str], first: int) -> list[object]:
    """Restore under every kind in turn and save it again; digests after each restore."""
    seen: list[object] = []
    for number, kind in enumerate(kinds):
        model, optimizer = build(kind, world, seed=rank + 100 * number + 5)
        state = TrainState(model, optimizer)
        with CheckpointManager(root, vote_timeout=20, retention=Retention(latest=50)) as manager:
            start = manager.restore(state)
            if start is None:
                fill(model, optimizer)
            seen.append((kind, start, digest(state)))
            manager.save(first + number, state).wait(20)
        dist.barrier()
    return seen


def save_large(rank: int, world: int, root: str) -> None:
    """48 MiB in one shard: six blocks of 8 MiB, so that reading a part can be told from all."""
    model = nn.Linear(1024, 12 * 1024, bias=False)
    with CheckpointManager(root) as manager:
        manager.save(0, TrainState(model)).wait(30)


def read_large(rank: int, world: int, root: str) -> int:
    """Bytes that this rank's restore took from the store, each rank holding half the rows."""
    model = nn.Linear(1024, 12 * 1024, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    with CheckpointManager(root, vote_timeout=30) as manager:
        before = manager._storage.traffic
        manager.restore(TrainState(model))
        return (manager._storage.traffic - before).received


def reshard_parts(
    rank: int, world: int, root: str, wanted: dict[str, list[str]]
) -> dict[str, tuple[int | None, list[str], dict[str, str], dict[str, str]]]:
    """Partial restores, each under a kind of its own; digests before and after each."""
    found = {}
    for kind, parts in wanted.items():
        model, optimizer = build(kind, world, seed=7)  # the same on all ranks
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.3)
        optimizer.step()
        state = TrainState(model, optimizer)
        before = digest(state)
        with CheckpointManager(root, vote_timeout=20) as manager:
            start = manager.restore(state, parts=parts)
            assert manager.last_restore is not None
            restored = sorted(manager.last_restore.parts)
        found[kind] = (start, restored, before, digest(state))
    return found


def disagree(rank: int, world: int, root: str, ways: list[str]) -> dict[str, list[str]]:
    """Ask for something else on rank 1; the error, and whether anything changed."""
    state = TrainState(*build("fsdp", world, seed=3))
    with CheckpointManager(root, vote_timeout=20) as manager:
        manager.save(0, state)
        manager.save(1, state)
    dist.barrier()
    found = {}
    for way in ways:
        model, optimizer = build("fsdp", world, seed=rank)
        state = TrainState(model, optimizer)
        local = [parameter.to_local().clone() for parameter in model.parameters()]
        asked: dict[str, object] = {
            "step": {"step": 0 if rank else 1},
            "strict": {"strict": rank == 0},
            "parts": {"parts": {"model"} if rank else {"model", "optimizer"}},
            "name": {"parts": {"modell"} if rank else {"model"}},
            "name of rank 0": {"parts": {"model"} if rank else {"modell"}},
        }[way]
        with CheckpointManager(root, vote_timeout=10) as manager:
            try:
                manager.restore(state, **asked)  # type: ignore[arg-type]
            except CkptError as error:
                found[way] = [type(error).__name__, str(error)]
        now = [parameter.to_local() for parameter in model.parameters()]
        assert all(map(torch.equal, local, now))
    return found
