"""The section about reading: a verified restore and what others offer."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ckpt import CheckpointManager, TrainState

from .processes import Settings
from .rounds import Sample, interleave
from .savers import DEADLINE_S
from .workload import train_state

STEP = 1


class _Reader:
    """One way to bring a checkpoint into the live tensors."""

    name: ClassVar[str]

    def load(self) -> None:
        """Load; this is what is timed."""
        raise NotImplementedError

    def measure(self, number: int) -> Sample:
        """``total`` and ``cpu`` (of all threads) in milliseconds."""
        del number
        self.prepare()
        used = time.process_time()
        began = time.perf_counter()
        self.load()
        total = time.perf_counter() - began
        used = time.process_time() - used
        self.tidy()
        return {"total": 1e3 * total, "cpu": 1e3 * used}

    def prepare(self) -> None:
        """What comes before; not timed."""

    def tidy(self) -> None:
        """What comes after; not timed."""


class Restore(_Reader):
    """``CheckpointManager.restore``: every byte verified before a live tensor is touched."""

    name = "ckpt CheckpointManager.restore, verified"

    def __init__(self, manager: CheckpointManager, state: TrainState) -> None:
        self._manager, self._state = manager, state

    def load(self) -> None:
        """Restore the newest step."""
        self._manager.restore(self._state)


class RestoreFresh(_Reader):
    """The same by a manager that has not saved yet, as after a restart: it has no arena."""

    name = "ckpt CheckpointManager.restore, verified, new manager"

    def __init__(self, root: Path, state: TrainState) -> None:
        self._root, self._state = root, state
        self._manager: CheckpointManager

    def prepare(self) -> None:
        """A new manager."""
        self._manager = CheckpointManager(str(self._root))

    def load(self) -> None:
        """Restore the newest step."""
        self._manager.restore(self._state)

    def tidy(self) -> None:
        """Close it."""
        self._manager.close()


class HuggingFace(_Reader):
    """Torch's own reader of safetensors shards, on the very same step; it verifies nothing."""

    name = "dcp HuggingFaceStorageReader"

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._folder, self._tensors = folder, tensors

    def load(self) -> None:
        """Load in place."""
        dcp.load(self._tensors, storage_reader=HuggingFaceStorageReader(str(self._folder)))


class FileSystem(_Reader):
    """DCP's default reader, on DCP's own checkpoint."""

    name = "dcp FileSystemReader"

    def __init__(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._folder, self._tensors = folder, tensors
        dcp.save(tensors, checkpoint_id=folder)

    def load(self) -> None:
        """Load in place."""
        dcp.load(self._tensors, checkpoint_id=self._folder)


class TorchLoad(_Reader):
    """``torch.load`` and a copy into place."""

    name = "torch.load + copy"

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._path, self._tensors = path, tensors
        torch.save(tensors, path)

    def load(self) -> None:
        """Load and copy."""
        found = torch.load(self._path, weights_only=True)
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(found[name])


def loads(settings: Settings) -> dict[str, Any]:
    """Every reader, from a warm page cache, into live tensors."""
    state, tensors = train_state(settings.workload)
    root = settings.folder / "run"
    with closing(CheckpointManager(str(root))) as manager:
        manager.save(STEP, state).wait(DEADLINE_S)
        (step,) = (root / "steps").glob("step-*")
        trials = [
            Restore(manager, state),
            RestoreFresh(root, state),
            HuggingFace(step, tensors),
            FileSystem(settings.folder / "dcp", tensors),
            TorchLoad(settings.folder / "torch.pt", tensors),
        ]
        rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds)
    return {"bytes": sum(t.nbytes for t in tensors.values()), "rounds": rounds}
