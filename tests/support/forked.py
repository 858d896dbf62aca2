"""Ranks that a test can watch, stop, kill and wait for one by one; real processes, soon started."""

from __future__ import annotations

import datetime
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait as wait_sentinels
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from support.warm_start import start

GROUP_TIMEOUT = datetime.timedelta(seconds=60)


class Crew:
    """Processes that run one function as the ranks of a gloo group.

    Args:
        world: number of ranks.
        fn: a function of a module in ``support``, called as ``fn(rank, world, *args)``.
        args: passed on; must pickle.
    """

    def __init__(self, world: int, fn: Callable[..., object], *args: object) -> None:
        self.world = world
        self._folder = tempfile.TemporaryDirectory(prefix="crew-")
        self.processes = [
            start(_child, rank, world, self._folder.name, fn, args, slot=rank)
            for rank in range(world)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whatever still runs is killed (also what is stopped); a failed test shows how it went."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
            process.close()
        for rank in range(self.world):
            print(f"rank {rank}: {self._said(rank)}", file=sys.stderr)
        self._folder.cleanup()

    def _said(self, rank: int) -> str:
        """How a rank ended: its error, what it returned, or nothing if it was killed."""
        error = Path(self._folder.name, f"error-{rank}.txt")
        result = Path(self._folder.name, f"result-{rank}.pkl")
        if error.exists():
            return error.read_text()
        return repr(pickle.loads(result.read_bytes())) if result.exists() else "no word"

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def stopped(self, rank: int) -> bool:
        """Whether a rank stands still by SIGSTOP, each of its threads included."""
        states = []
        for task in Path(f"/proc/{self.processes[rank].pid}/task").iterdir():
            try:
                text = (task / "stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue  # a thread that ended meanwhile
            states.append(text.rpartition(")")[2].split()[0])
        return bool(states) and all(state == "T" for state in states)

    def wait_stopped(self, rank: int, timeout: float) -> None:
        """Until a rank has stopped itself."""
        deadline = time.monotonic() + timeout
        while not self.stopped(rank):
            assert time.monotonic() < deadline, f"rank {rank} did not stop within {timeout} s"
            time.sleep(0.005)

    def join(self, *ranks: int, timeout: float) -> None:
        """Until the ranks (all of them if none is named) have ended; late ones are an error."""
        deadline = time.monotonic() + timeout
        for rank in ranks or range(self.world):
            process = self.processes[rank]
            left = max(0.0, deadline - time.monotonic())
            wait_sentinels([process.sentinel], timeout=left)
            assert not process.is_alive(), f"rank {rank} still runs after {timeout} s: a hang"
            process.join()

    def died(self, rank: int) -> bool:
        """Whether a rank ended by SIGKILL."""
        return self.processes[rank].exitcode == -signal.SIGKILL

    def result(self, rank: int) -> Any:
        """What a rank's function returned.

        Raises:
            AssertionError: it raised, or ended in another way.
        """
        error = Path(self._folder.name, f"error-{rank}.txt")
        assert not error.exists(), f"rank {rank} raised:\n{error.read_text()}"
        code = self.processes[rank].exitcode
        assert code == 0, f"rank {rank} ended with status {code}"
        # Written by our own child a moment ago, in a private folder.
        return pickle.loads(Path(self._folder.name, f"result-{rank}.pkl").read_bytes())


def _child(
    rank: int, world: int, folder: str, fn: Callable[..., object], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        if world > 1:
            names = [name for _, name in socket.if_nameindex()]
            loopback = next((name for name in names if name in ("lo", "lo0")), None)
            if loopback is not None:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world,
                timeout=GROUP_TIMEOUT,
            )
        result = pickle.dumps(fn(rank, world, *args))
        temporary = Path(folder, f"result-{rank}.tmp")
        temporary.write_bytes(result)
        temporary.rename(Path(folder, f"result-{rank}.pkl"))
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    # Threads that a fault holds for ever, and torch's teardown, have nothing left to do.
    os._exit(0)
