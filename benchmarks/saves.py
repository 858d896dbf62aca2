"""Sections about whole saves: stall, end to end, durable, planning."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

from .peers import (
    DcpAsync,
    DcpAsyncProcess,
    DcpSave,
    DcpSaveCached,
    TorchCheckpointing,
    TorchSnapshot,
    optional,
)
from .processes import Settings
from .rounds import interleave, slowest
from .savers import Manager, Memcpy, RawWrite, RawWriteSynced, Saver, TorchSave, local
from .workload import train_state


def saves(settings: Settings) -> dict[str, Any]:
    """Every saver on the file system of ``settings.folder``."""
    state, tensors = train_state(settings.workload)
    folder = settings.folder
    size = sum(tensor.nbytes for tensor in local(tensors))
    skipped: dict[str, str] = {}
    with ExitStack() as stack:
        manager = stack.enter_context(closing(Manager(state, folder)))
        savers: list[Saver] = [
            Memcpy(tensors),
            manager,
            DcpSave(tensors, folder),
            DcpAsync(tensors, folder),
            TorchSave(tensors, folder),
            RawWrite(size, folder),
            RawWriteSynced(size, folder),
        ]
        if dist.get_world_size() == 1:
            peers, skipped = optional(
                {
                    DcpAsyncProcess.name: lambda: DcpAsyncProcess(tensors, folder),
                    TorchCheckpointing.name: lambda: TorchCheckpointing(tensors, folder),
                    TorchSnapshot.name: lambda: TorchSnapshot(tensors, folder),
                }
            )
            for peer in peers:
                stack.callback(peer.close)
            savers += peers
        else:
            savers.append(DcpSaveCached(tensors, folder))
        rounds = interleave(savers, repeats=settings.repeats, seconds=settings.seconds)
        plans = _second_plans(manager, settings.repeats)
    return {
        "ranks": dist.get_world_size(),
        "bytes_per_rank": size,
        "tensors": len(tensors),
        "rounds": rounds,
        "plan": plans,
        "skipped": skipped,
    }


def core_saves(settings: Settings) -> dict[str, Any]:
    """The savers of the growth curves: floors, ours, and two peers."""
    state, tensors = train_state(settings.workload)
    folder = settings.folder
    size = sum(tensor.nbytes for tensor in local(tensors))
    with closing(Manager(state, folder)) as manager:
        savers: list[Saver] = [
            Memcpy(tensors),
            manager,
            DcpAsync(tensors, folder),
            TorchSave(tensors, folder),
            RawWrite(size, folder),
        ]
        rounds = interleave(savers, repeats=settings.repeats, seconds=settings.seconds)
    return {
        "ranks": dist.get_world_size(),
        "bytes_per_rank": size,
        "tensors": len(tensors),
        "rounds": rounds,
    }


def _second_plans(saver: Manager, repeats: int) -> dict[str, Any]:
    """How long a save of a known layout looks for its plan, and how many collectives it makes."""
    manager = saver.manager
    planner = manager._planner  # the manager's metrics do not split the stall
    original = planner.layout
    took: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        took.append(1e3 * (time.perf_counter() - began))
        return result

    planner.layout = timed  # type: ignore[method-assign]
    collectives = 0
    samples = []
    try:
        for number in range(repeats):
            with profile(activities=[ProfilerActivity.CPU]) as trace:
                saver.start(1_000_000 + number)
            collectives += sum(
                event.count for event in trace.key_averages() if event.key.startswith("c10d::")
            )
            saver.finish()
            saver.tidy(number)
            samples.append(slowest({"plan": took[-1]})["plan"])
    finally:
        planner.layout = original  # type: ignore[method-assign]
    total = torch.tensor([collectives])
    dist.all_reduce(total)
    return {"ms": samples, "collectives": int(total)}
