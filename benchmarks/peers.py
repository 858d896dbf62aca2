"""The savers that others offer, used as their documentation says."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, SavePlan
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from .rounds import Sample
from .savers import DEADLINE_S, Saver, remove_tree

Tensors = Mapping[str, torch.Tensor]


class _PlanTimer(DefaultSavePlanner):
    """DCP's default planner with a clock: from the first call to the finished plan."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()
        super().set_up_planner(*args, **kwargs)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        done = super().finish_plan(new_plan)
        self.milliseconds = 1e3 * (time.perf_counter() - self.began)
        return done


class DcpSave(Saver):
    """``torch.distributed.checkpoint.save`` as it comes (it syncs its files)."""

    name = "dcp.save"
    cached: ClassVar[bool] = False

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self._tensors = dict(tensors)
        self._folder = folder / self.name
        self._plan_ms = 0.0

    def start(self, step: int) -> None:
        """Plan, write, commit."""
        planner = _PlanTimer(enable_plan_caching=self.cached)
        dcp.save(self._tensors, checkpoint_id=self._folder / f"{step}", planner=planner)
        self._plan_ms = planner.milliseconds

    def tidy(self, step: int) -> None:
        """Remove the checkpoint."""
        remove_tree(self._folder / f"{step}")

    def measure(self, number: int) -> Sample:
        """The planner's milliseconds too."""
        return {**super().measure(number), "plan": self._plan_ms}


class DcpSaveCached(DcpSave):
    """The same with DCP's plan cache."""

    name = "dcp.save, cached plan"
    cached = True


class DcpAsync(Saver):
    """``torch.distributed.checkpoint.async_save`` as it comes, in a thread."""

    name = "dcp.async_save, thread"
    kind: ClassVar[AsyncCheckpointerType] = AsyncCheckpointerType.THREAD

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        self._tensors = dict(tensors)
        self._folder = folder / self.name
        self._future: Any = None

    def start(self, step: int) -> None:
        """Stage; DCP goes on by itself."""
        self._future = dcp.async_save(
            self._tensors,
            checkpoint_id=self._folder / f"{step}",
            async_checkpointer_type=self.kind,
        )

    def done(self) -> bool:
        """Whether DCP is through."""
        return bool(self._future.done())

    def finish(self) -> None:
        """Wait for DCP."""
        self._future.result(timeout=DEADLINE_S)

    def tidy(self, step: int) -> None:
        """Remove the checkpoint."""
        remove_tree(self._folder / f"{step}")


class DcpAsyncProcess(DcpAsync):
    """The same in a process beside."""

    name = "dcp.async_save, process"
    kind = AsyncCheckpointerType.PROCESS


class TorchCheckpointing(Saver):
    """``torch_checkpointing``'s manager, asynchronous."""

    name = "torch_checkpointing, async"

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        self._tensors = dict(tensors)
        self._folder = folder / "torch_checkpointing"
        self._folder.mkdir()
        config = CheckpointManager.Config.with_async_save()
        # Its direct I/O needs aligned sizes, which these tensors do not have (EINVAL).
        config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(config)
        self._future: Any = None

    def start(self, step: int) -> None:
        """Stage; a process writes."""
        self._future = self._manager.save(str(self._folder / f"{step}"), {"state": self._tensors})

    def done(self) -> bool:
        """Whether the process is through."""
        return bool(self._future.done())

    def finish(self) -> None:
        """Wait for the process."""
        self._future.result(timeout=DEADLINE_S)

    def tidy(self, step: int) -> None:
        """Remove the checkpoint."""
        remove_tree(self._folder / f"{step}")

    def close(self) -> None:
        """End its process."""
        self._manager.close()


class TorchSnapshot(Saver):
    """``torchsnapshot``'s ``async_take``."""

    name = "torchsnapshot, async"

    def __init__(self, tensors: Tensors, folder: Path) -> None:
        import torchsnapshot

        self._kind = torchsnapshot.Snapshot
        self._state = {"state": torchsnapshot.StateDict(**tensors)}
        self._folder = folder / "torchsnapshot"
        self._pending: Any = None

    def start(self, step: int) -> None:
        """Stage; a thread writes."""
        self._pending = self._kind.async_take(str(self._folder / f"{step}"), self._state)

    def done(self) -> bool:
        """Whether the thread is through."""
        return bool(self._pending.done())

    def finish(self) -> None:
        """Wait for the thread."""
        self._pending.wait()

    def tidy(self, step: int) -> None:
        """Remove the snapshot."""
        remove_tree(self._folder / f"{step}")


def first_line(error: Exception) -> str:
    """Why a peer is not measured."""
    text = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {text.splitlines()[0][:160]}"


def optional(
    makers: Mapping[str, Callable[[], Saver]],
) -> tuple[list[Saver], dict[str, str]]:
    """The peers that are installed and work here, and for the others the reason.

    Each is tried with one save; only for one rank, where a failure leaves nobody waiting.
    """
    works: list[Saver] = []
    skipped = {}
    for name, make in makers.items():
        saver: Saver | None = None
        try:
            saver = make()
            saver.measure(-1)
            works.append(saver)
        except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason
            skipped[name] = first_line(error)
            if saver is not None:
                with suppress(Exception):
                    saver.close()
    return works, skipped
