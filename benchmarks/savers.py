"""Our way to save and the floors; each is started (the stall) and then finished."""

from __future__ import annotations

import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from ckpt import CheckpointManager, Retention, SaveHandle, TrainState

from .rounds import Sample

DEADLINE_S = 300.0
PIECE_BYTES = 16 << 20


def local(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of every tensor."""
    with torch.no_grad():
        return [t.to_local() if isinstance(t, DTensor) else t.detach() for t in tensors.values()]


class Saver(ABC):
    """One way to save the same tensors."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, step: int) -> None:
        """What the training loop has to wait for."""

    def finish(self) -> None:
        """Wait until the save is complete; by default ``start`` waited already."""
        return

    def done(self) -> bool:
        """Whether the save is complete; asked between the steps of a training loop."""
        return True

    def tidy(self, step: int) -> None:
        """Remove what was written; not timed."""
        return

    def close(self) -> None:
        """End what the saver keeps running."""
        return

    def measure(self, number: int) -> Sample:
        """``stall``, ``total`` and ``cpu`` (of all threads) of one save, in milliseconds."""
        dist.barrier()
        used = time.process_time()
        begin = time.perf_counter()
        self.start(number)
        stall = time.perf_counter() - begin
        self.finish()
        total = time.perf_counter() - begin
        used = time.process_time() - used
        dist.barrier()
        self.tidy(number)
        return {"stall": 1e3 * stall, "total": 1e3 * total, "cpu": 1e3 * used}


class Memcpy(Saver):
    """The floor of every stall: the bytes copied once into memory that exists already.

    The target is one block, as the arena is: scattered targets would make the floor slower.
    """

    name = "memcpy of the same bytes"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._source = local(tensors)
        ends, end = [], 0
        for tensor in self._source:
            end += tensor.nbytes + -tensor.nbytes % 64
            ends.append(end)
        block = torch.zeros(end, dtype=torch.uint8)
        self._target = []
        for tensor, stop in zip(self._source, ends, strict=True):
            start = stop - tensor.nbytes - (-tensor.nbytes % 64)
            flat = block[start : start + tensor.nbytes].view(tensor.dtype)
            self._target.append(flat.view(tensor.shape))

    def start(self, step: int) -> None:
        """Copy."""
        del step
        with torch.no_grad():
            torch._foreach_copy_(self._target, self._source)


class RawWrite(Saver):
    """The floor of every save: the bytes written to one new file."""

    name = "raw write"
    sync: ClassVar[bool] = False

    def __init__(self, size: int, folder: Path) -> None:
        # Touched, so that the first write does not pay for the pages.
        self._data = memoryview(torch.ones(size, dtype=torch.uint8).numpy()).cast("B")
        self._path = folder / f"raw-{dist.get_rank()}"

    def start(self, step: int) -> None:
        """Write, and sync if that is asked for."""
        del step
        with self._path.open("wb", buffering=0) as file:
            done = 0
            while done < len(self._data):
                done += file.write(self._data[done : done + PIECE_BYTES])
            if self.sync:
                os.fsync(file.fileno())

    def tidy(self, step: int) -> None:
        """Remove the file."""
        del step
        self._path.unlink(missing_ok=True)


class RawWriteSynced(RawWrite):
    """The floor of every durable save."""

    name = "raw write + fsync"
    sync = True


class TorchSave(Saver):
    """``torch.save`` of the local tensors, synced."""

    name = "torch.save + fsync"

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        self._tensors = dict(zip(tensors, local(tensors), strict=True))
        self._path = folder / f"torch-{dist.get_rank()}.pt"

    def start(self, step: int) -> None:
        """Write and sync."""
        del step
        with self._path.open("wb") as file:
            torch.save(self._tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def tidy(self, step: int) -> None:
        """Remove the file."""
        del step
        self._path.unlink(missing_ok=True)


class Manager(Saver):
    """``ckpt.CheckpointManager.save``: checksums, fsync, vote and commit."""

    name = "ckpt CheckpointManager.save"

    def __init__(self, state: TrainState, folder: Path) -> None:
        self._state = state
        self._root = folder / "ckpt"
        self.manager = CheckpointManager(str(self._root), retention=Retention(latest=1))
        self.handle: SaveHandle | None = None

    def start(self, step: int) -> None:
        """Copy into the arena."""
        self.handle = self.manager.save(step, self._state)

    def finish(self) -> None:
        """Wait for the commit."""
        if self.handle is not None:
            self.handle.wait(DEADLINE_S)

    def done(self) -> bool:
        """Whether it is committed."""
        return self.handle is None or self.handle.committed.done()

    def tidy(self, step: int) -> None:
        """Let retention finish, so that it disturbs nobody's measurement."""
        del step
        self.manager.wait(DEADLINE_S)
        dist.barrier()

    def close(self) -> None:
        """Stop the manager's thread."""
        self.manager.close()


def remove_tree(folder: Path) -> None:
    """Rank 0 removes a directory that all ranks wrote to."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
