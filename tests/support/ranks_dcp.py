"""What the ranks of the tests of plain DCP calls do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckpt import CheckpointManager
from ckpt.dcp import Reader, Writer, converted, target
from ckpt.errors import CkptError
from ckpt.storage.posix import PosixStorage
from support.tiny_run import Run


def whole() -> dict[str, torch.Tensor]:
    """The tensors as one rank holds them: odd sizes, a row short of the ranks, 16 bits, 0-d."""
    generator = torch.Generator().manual_seed(11)
    return {
        "rows": torch.randn(5, 6, generator=generator),
        "columns": torch.randn(4, 7, generator=generator).to(torch.bfloat16),
        "one": torch.randn(1, 8, generator=generator),
        "copied": torch.randn(3, 3, generator=generator),
        "plain": torch.randn(9, generator=generator),
        "step": torch.tensor(4, dtype=torch.int64),
    }


SAVED = {"rows": Shard(0), "columns": Shard(1), "one": Shard(0), "copied": Replicate()}
LOADED = {"rows": Shard(1), "columns": Shard(0), "one": Shard(1), "copied": Shard(0)}
ENTRIES = {"epoch": 3, "betas": (0.9, float("inf")), "names": ["a", "b"], "blob": b"\x80\x04."}


def placed(mesh: DeviceMesh, how: Mapping[str, Any], values: Mapping[str, torch.Tensor]) -> Any:
    tensors = {
        name: distribute_tensor(value, mesh, [how[name]]) if name in how else value.clone()
        for name, value in values.items()
    }
    return {"model": tensors}


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in whole().items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gloo() -> dist.ProcessGroup:
    """A group for checkpoints alone, as the guide advises."""
    return dist.new_group(backend="gloo")


def save_and_load(
    rank: int, world: int, url: str, options: dict[str, str] | None
) -> tuple[list[str], dict[str, Any]]:
    """Names of the tensors that did not come back, from a save and an async one; the entries."""
    mesh, group = init_device_mesh("cpu", (world,)), gloo()
    writer, reader = Writer(url, storage_options=options), Reader(url, storage_options=options)
    saved = placed(mesh, SAVED, whole()) | {"extra": dict(ENTRIES)}
    if options is None:
        dcp.save(saved, checkpoint_id=f"{url}-stock", process_group=group)
    with converted():
        dcp.save(saved, storage_writer=writer, process_group=group)
        future = dcp.async_save(
            saved, storage_writer=writer, checkpoint_id=f"{url}-async", process_group=group
        )
        for tensor in saved["model"].values():
            local(tensor).zero_()
        future.result()
    wrong, entries = [], {}
    for identity in (url, f"{url}-async"):
        live = placed(mesh, LOADED, zeros()) | {"extra": dict.fromkeys(ENTRIES)}
        with converted():
            dcp.load(live, storage_reader=reader, checkpoint_id=identity, process_group=group)
        wrong += [
            f"{identity}: {name}"
            for name, value in whole().items()
            if not torch.equal(full(live["model"][name]), value)
        ]
        entries = live["extra"]
    return wrong, entries


class Failing(dcp.DefaultSavePlanner):
    """Raises on one rank when the data of its shard is asked for."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def resolve_data(self, write_item: Any) -> Any:
        if self.fails:
            msg = "this rank's disk is on fire"
            raise OSError(msg)
        return super().resolve_data(write_item)


def error_of(work: Callable[[], object]) -> str:
    try:
        with converted():
            work()
    except CkptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fail_then_save(rank: int, world: int, url: str) -> list[str]:
    """Rank 1 fails, then both try again, then once more onto the committed id."""
    mesh, group = init_device_mesh("cpu", (world,)), gloo()
    saved = placed(mesh, SAVED, whole())
    writer = Writer(url)
    errors = [
        error_of(
            lambda: dcp.save(
                saved, storage_writer=writer, planner=Failing(rank == 1), process_group=group
            )
        ),
        error_of(lambda: dcp.load(saved, storage_reader=Reader(url), process_group=group)),
    ]
    for _ in range(2):
        errors.append(error_of(lambda: dcp.save(saved, storage_writer=writer, process_group=group)))
    return errors


class OneBitOff(PosixStorage):
    """A disk that gives one wrong bit of every file."""

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        super().read_into(path, start, target)
        target[-1] ^= 1


def load_damaged(rank: int, world: int, url: str) -> tuple[str, bool]:
    """Rank 1's disk is bad: the error, and whether every live tensor is as it was."""
    mesh = init_device_mesh("cpu", (world,))
    saved = placed(mesh, SAVED, whole())
    with converted():
        dcp.save(saved, storage_writer=Writer(url))
    if rank == 1:
        target.open_storage = lambda url, options: OneBitOff(url)
    live = placed(mesh, SAVED, zeros())
    error = error_of(lambda: dcp.load(live, storage_reader=Reader(url)))
    return error, not any(local(tensor).any() for tensor in live["model"].values())


def faults(rank: int, world: int, root: str) -> tuple[list[str], tuple[str, bool]]:
    return (
        fail_then_save(rank, world, f"{root}/id"),
        load_damaged(rank, world, f"{root}/damaged"),
    )


def trainer_steps(rank: int, world: int, root: str) -> tuple[dict[str, Any], str]:
    """Two steps of a sharded run: the last one's whole tensors, and what loading both gives."""
    run = Run(rank, world)
    with CheckpointManager(root, vote_timeout=20) as manager:
        for step in range(2):
            run.step()
            manager.save(step, run.state)
    tensors = run.state.live().tensors
    values = {name: full(tensor.detach()).tolist() for name, tensor in tensors.items()}
    reader = Reader(root, step=rank)
    live = {"model": {"a": torch.zeros(3, 6)}}
    return values, error_of(lambda: dcp.load(live, storage_reader=reader))
