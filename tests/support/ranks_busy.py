"""What the ranks of the tests with a slow store and with signals do."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from ckpt import CheckpointManager, CkptError, Retention, SaveHandle, SaveMetrics, TrainState


class Gate:
    """Holds a manager's writes back until it is opened."""

    def __init__(self, manager: CheckpointManager, shut: bool = True) -> None:
        self.open = threading.Event()
        self.waiting = threading.Semaphore(0)
        if not shut:
            self.open.set()
        put: Callable[..., Any] = manager._storage.put

        def slow(path: str, data: Any) -> None:
            self.waiting.release()
            assert self.open.wait(30)
            put(path, data)

        manager._storage.put = slow  # type: ignore[method-assign]


def small_state() -> TrainState:
    torch.manual_seed(0)
    return TrainState(torch.nn.Linear(2, 2))


def result(handle: SaveHandle) -> tuple[int | None, bool]:
    return handle.committed.result(30), handle.skipped


def busy(rank: int, world: int, root: str, mode: str, slow: int, saves: int) -> dict[str, Any]:
    """Saves come faster than rank ``slow`` can write them; what became of each."""
    state = small_state()
    seen: list[SaveMetrics] = []
    with CheckpointManager(
        root,
        when_busy=mode,  # type: ignore[arg-type]
        vote_timeout=20,
        retention=Retention(latest=50),
        on_metrics=seen.append,
    ) as manager:
        gate = Gate(manager, shut=rank == slow)
        handles = [manager.save(step, state) for step in range(saves)]
        if rank == slow:
            assert gate.waiting.acquire(timeout=30)
            gate.open.set()
        found = [result(handle) for handle in handles]
        manager.wait()
        # Nothing is stuck: what was left out can be saved now, under the same number.
        again = [step for step, handle in enumerate(handles) if handle.skipped]
        if again:
            manager.save(again[0], state).wait(30)
        manager.wait()
        dist.barrier()
        return {
            "found": found,
            "steps": manager.steps(),
            "skipped": sorted(m.step or 0 for m in seen if m.skipped),
            "reports": len(seen),
        }


def many_busy(rank: int, world: int, root: str, mode: str, saves: int) -> dict[str, Any]:
    """Saves in a hurry, each rank's store with delays of its own; ranks must stay agreed."""
    state = small_state()
    pause = threading.Event()
    with CheckpointManager(
        root,
        when_busy=mode,  # type: ignore[arg-type]
        vote_timeout=20,
        retention=Retention(latest=500),
    ) as manager:
        put = manager._storage.put

        def uneven(path: str, data: Any) -> None:
            pause.wait(0.004 * ((sum(path.encode()) + 3 * rank) % 4))
            put(path, data)

        manager._storage.put = uneven  # type: ignore[method-assign]
        handles = []
        for step in range(saves):
            handles.append(manager.save(step, state))
            pause.wait(0.002 * ((step * 7 + rank * 5) % 5))
        found = [result(handle) for handle in handles]
        manager.wait()
        dist.barrier()
        return {"found": found, "steps": manager.steps()}


def busy_error(rank: int, world: int, root: str, mode: str) -> list[str]:
    """Rank 1's own error of a save is raised by its next one, before the ranks agree there."""
    state = small_state()
    said = []
    with CheckpointManager(root, when_busy=mode, vote_timeout=20) as manager:  # type: ignore[arg-type]
        manager.save(0, state).wait(30)
        if rank == 1:
            manager._work._errors.append(CkptError("only rank 1 knows"))
        dist.barrier()
        for step in (1, 2):
            try:
                error = manager.save(step, state).committed.exception(30)
                said.append(type(error).__name__)
            except CkptError as problem:
                said.append(f"raised {problem}")
    return said


def every_way(rank: int, world: int, root: str) -> dict[str, Any]:
    """All of the above in one set of processes."""
    found: dict[str, Any] = {}
    for mode in ("skip", "latest"):
        for slow in range(world):
            found[f"{mode} slow {slow}"] = busy(rank, world, f"{root}/{mode}{slow}", mode, slow, 5)
        found[f"{mode} uneven"] = many_busy(rank, world, f"{root}/{mode}-many", mode, 30)
        found[f"{mode} error"] = busy_error(rank, world, f"{root}/{mode}-error", mode)
    return found


def stopped(rank: int, world: int, root: str) -> dict[str, Any]:
    """A loop that saves nothing by itself; SIGTERM comes to rank 1 alone, in its fourth step."""
    state = small_state()
    before = signal.getsignal(signal.SIGTERM)
    found: dict[str, Any] = {}
    with CheckpointManager(root, vote_timeout=20, when_busy="skip") as manager:
        manager.save_on_signal(deadline=15.0)
        for step in range(100):
            state.extra["step"] = step
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                found["alive"] = True
            if manager.preempted():
                handle = manager.last_save(step, state, metrics={"x": 1.0})
                found |= {"step": step, "committed": handle and handle.committed.result(0)}
                found["again"] = manager.last_save(step, state)  # saved: waited for, if need be
                break
        found["still"] = manager.preempted()
        dist.barrier()
        found["steps"] = manager.steps()
    found["restored"] = signal.getsignal(signal.SIGTERM) is before
    return found


def stopped_late(rank: int, world: int, root: str) -> dict[str, Any]:
    """The store is stuck: the last save gives up at its deadline, on both ranks."""
    state = small_state()
    manager = CheckpointManager(root, vote_timeout=20)
    manager.save_on_signal(signal.SIGUSR1, deadline=2.0)
    gate = Gate(manager, shut=rank == 0)
    os.kill(os.getpid(), signal.SIGUSR1)
    began = time.monotonic()
    assert manager.preempted()
    error = None
    try:
        manager.last_save(0, state)
    except CkptError as problem:
        error = f"{type(problem).__name__}: {problem}"
    took = time.monotonic() - began
    gate.open.set()
    manager.close()
    dist.barrier()
    return {"error": error, "took": took, "steps": manager.steps()}


def stopped_after_an_error(rank: int, world: int, root: str) -> dict[str, Any]:
    """An earlier failure is kept for later, full slots are waited for, and the step is saved."""
    state = small_state()
    manager = CheckpointManager(root, vote_timeout=20, when_busy="skip")
    gate = Gate(manager, shut=rank == 0)
    handles = [manager.save(step, state) for step in range(2)]
    if rank == 1:
        manager._work._errors.append(CkptError("only rank 1 knows"))
        manager.request_stop()
    assert manager.preempted()
    threading.Timer(0.3, gate.open.set).start()
    last = manager.last_save(2, state)
    assert last is not None
    found: dict[str, Any] = {"saved": [result(handle) for handle in (*handles, last)]}
    try:
        manager.close()
    except CkptError as error:
        found["later"] = str(error)
    return found


def every_stop(rank: int, world: int, root: str) -> dict[str, Any]:
    """All of the above in one set of processes."""
    return {
        "signal": stopped(rank, world, f"{root}/signal"),
        "late": stopped_late(rank, world, f"{root}/late"),
        "error": stopped_after_an_error(rank, world, f"{root}/error"),
    }
