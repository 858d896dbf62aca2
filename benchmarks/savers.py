"""The ways to save that are compared; each is started (the stall) and then finished."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor

from ckpt import CheckpointManager, TrainState

DEADLINE_S = 300.0


def local(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """This rank's part of every tensor."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]


class Saver(ABC):
    """One way to save the same tensors."""

    name: ClassVar[str]

    @abstractmethod
    def start(self, step: int) -> None:
        """What the training loop has to wait for."""

    def finish(self) -> None:
        """Wait until the save is durable; by default ``start`` waited already."""
        return

    def tidy(self) -> None:
        """Remove what was written; not timed."""
        return


class Memcpy(Saver):
    """The floor of every stall: the bytes copied once into memory that exists already."""

    name = "memcpy of the same bytes"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._source = local(tensors)
        self._target = [torch.empty_like(t) for t in self._source]

    def start(self, step: int) -> None:
        """Copy."""
        del step
        torch._foreach_copy_(self._target, self._source)


class RawWrite(Saver):
    """The floor of every save: the bytes written to one file and synced."""

    name = "raw write + fsync"

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        size = sum(t.nbytes for t in local(tensors))
        # Touched, so that the first write does not pay for the pages.
        self._data = memoryview(torch.ones(size, dtype=torch.uint8).numpy()).cast("B")
        self._path = folder / f"raw-{dist.get_rank()}"

    def start(self, step: int) -> None:
        """Write and sync."""
        del step
        with self._path.open("wb", buffering=0) as file:
            done = 0
            while done < len(self._data):
                done += file.write(self._data[done : done + (16 << 20)])
            os.fsync(file.fileno())

    def tidy(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


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

    def tidy(self) -> None:
        """Remove the file."""
        self._path.unlink(missing_ok=True)


class DcpAsync(Saver):
    """``torch.distributed.checkpoint.async_save`` as it comes."""

    name = "dcp.async_save"

    def __init__(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        self._tensors = dict(tensors)
        self._folder = folder / "dcp"
        self._future: Any = None

    def start(self, step: int) -> None:
        """Stage; DCP goes on in a thread."""
        self._future = dcp.async_save(self._tensors, checkpoint_id=self._folder / f"{step}")

    def finish(self) -> None:
        """Wait for DCP's thread."""
        self._future.result(timeout=DEADLINE_S)

    def tidy(self) -> None:
        """Remove the checkpoint (one rank does)."""
        if dist.get_rank() == 0:
            shutil.rmtree(self._folder)


class Manager(Saver):
    """``ckpt.CheckpointManager.save``, with checksums, vote and commit."""

    name = "CheckpointManager.save"

    def __init__(self, state: TrainState, folder: Path) -> None:
        self._state = state
        self._manager = CheckpointManager(str(folder / "ckpt"))
        self._handle: Any = None

    def start(self, step: int) -> None:
        """Copy into the arena."""
        self._handle = self._manager.save(step, self._state)

    def finish(self) -> None:
        """Wait for the commit."""
        self._handle.wait(DEADLINE_S)

    def close(self) -> None:
        """Stop the manager's thread."""
        self._manager.close()
