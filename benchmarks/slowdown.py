"""How much slower a Python-bound training step is while a save goes on behind it."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from typing import Any

import torch

from .peers import DcpAsync, DcpAsyncProcess, TorchCheckpointing, TorchSnapshot, optional
from .processes import Settings
from .rounds import Sample, interleave
from .savers import Manager, Saver
from .workload import train_state

OPERATIONS = 200
IDLE_SECONDS = 0.4
IDLE = "no save"


class Loop:
    """A step that is many tiny operations, so that it needs the interpreter all the time."""

    def __init__(self) -> None:
        self._values = torch.zeros(16)

    def step(self) -> float:
        """Run one step; returns its seconds."""
        began = time.perf_counter()
        for _ in range(OPERATIONS):
            self._values.add_(1.0)
        return time.perf_counter() - began


class Idle:
    """The step with nothing behind it."""

    name = IDLE

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def measure(self, number: int) -> Sample:
        """Mean step in milliseconds."""
        del number
        times = []
        until = time.perf_counter() + IDLE_SECONDS
        while time.perf_counter() < until:
            times.append(self._loop.step())
        return {"step": 1e3 * sum(times) / len(times)}


class WhileSaving:
    """The step from the moment ``save()`` has returned until the save is complete."""

    def __init__(self, loop: Loop, saver: Saver) -> None:
        self._loop, self._saver = loop, saver
        self.name = saver.name

    def measure(self, number: int) -> Sample:
        """Mean step in milliseconds; the stall of ``save()`` itself is another row's."""
        self._saver.start(number)
        times = []
        while not times or not self._saver.done():
            times.append(self._loop.step())
        self._saver.finish()
        self._saver.tidy(number)
        return {"step": 1e3 * sum(times) / len(times)}


def slowdown(settings: Settings) -> dict[str, Any]:
    """Mean step behind each asynchronous saver, and behind none."""
    state, tensors = train_state(settings.workload)
    folder = settings.folder
    loop = Loop()
    with ExitStack() as stack:
        peers, skipped = optional(
            {
                DcpAsync.name: lambda: DcpAsync(tensors, folder),
                DcpAsyncProcess.name: lambda: DcpAsyncProcess(tensors, folder),
                TorchCheckpointing.name: lambda: TorchCheckpointing(tensors, folder),
                TorchSnapshot.name: lambda: TorchSnapshot(tensors, folder),
            }
        )
        for peer in peers:
            stack.callback(peer.close)
        manager = stack.enter_context(closing(Manager(state, folder)))
        trials = [Idle(loop), *(WhileSaving(loop, saver) for saver in (manager, *peers))]
        rounds = interleave(trials, repeats=settings.repeats, seconds=settings.seconds)
    return {"rounds": rounds, "skipped": skipped}
