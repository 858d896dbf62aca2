"""Runs a function on several real processes that form one gloo group."""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import wait as wait_sentinels
from pathlib import Path

import torch
import torch.distributed as dist

from support.warm_start import start

GROUP_TIMEOUT = datetime.timedelta(seconds=60)
GRACE_SECONDS = 15.0
"""How long the others may go on after a rank failed, so that their errors are seen too."""


class RankFailed(AssertionError):
    """A rank raised, died or did not finish; the message holds every rank's traceback."""


def run_ranks(
    world: int,
    fn: Callable[..., object],
    *args: object,
    timeout: float = 120,
    killed: Collection[int] = (),
) -> list[object]:
    """Call ``fn(rank, world, *args)`` on ``world`` gloo ranks, each a process of its own.

    Args:
        world: number of processes.
        fn: a function of an importable module (``support.ranks_<area>``).
        args: passed on to every rank; must pickle.
        timeout: seconds for the whole call; whoever still runs then is killed.
        killed: ranks that are expected to die by SIGKILL; their result is None.

    Returns:
        The ranks' return values, by rank.

    Raises:
        RankFailed: a rank raised, ended with a wrong status or was too slow.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes: list[multiprocessing.process.BaseProcess] = []
        try:
            for rank in range(world):
                processes.append(start(_child, rank, world, folder, fn, args, slot=rank))
            late = _join(processes, timeout, killed)
            return _results(folder, [p.exitcode for p in processes], late, timeout, killed)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
                process.close()


def _join(
    processes: list[multiprocessing.process.BaseProcess], timeout: float, killed: Collection[int]
) -> set[int]:
    """Wait for all; returns the ranks that had to be killed because they were late."""
    deadline = time.monotonic() + timeout
    while True:
        running = [p.sentinel for p in processes if p.is_alive()]
        left = deadline - time.monotonic()
        if not running or left <= 0:
            break
        wait_sentinels(running, timeout=left)
        failed = any(
            p.exitcode not in (None, 0) and not (rank in killed and p.exitcode == -signal.SIGKILL)
            for rank, p in enumerate(processes)
        )
        if failed:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    late = set()
    for rank, process in enumerate(processes):
        if process.is_alive():
            late.add(rank)
            process.kill()
        process.join()
    return late


def _results(
    folder: str, codes: list[int | None], late: set[int], timeout: float, killed: Collection[int]
) -> list[object]:
    values: list[object] = []
    problems = []
    for rank, code in enumerate(codes):
        error = Path(folder, f"error-{rank}.txt")
        if error.exists():
            problems.append(f"rank {rank} raised:\n{error.read_text()}")
        elif rank in late:
            problems.append(f"rank {rank} was still running after {timeout} s, or a peer failed")
        elif rank in killed:
            if code != -signal.SIGKILL:
                problems.append(f"rank {rank} should have been killed, exit status {code}")
            values.append(None)
        elif code != 0:
            problems.append(f"rank {rank} ended with exit status {code}")
        else:
            # Written by our own child a moment ago, in a private folder.
            values.append(pickle.loads(Path(folder, f"result-{rank}.pkl").read_bytes()))
    if problems:
        raise RankFailed("\n".join(problems))
    return values


def _child(
    rank: int,
    world: int,
    folder: str,
    fn: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    # torch's static teardown aborts about one rank in thirty on a busy machine, after the group is
    # destroyed and all Python code has run. Handlers run last in, first out, so those of the
    # function come before this one; a rank that failed has left with another status by then.
    atexit.register(os._exit, 0)
    torch.set_num_threads(1)
    loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=GROUP_TIMEOUT,
        )
        # A rank that has done its work may leave before the others have all met each other.
        dist.barrier()
        result = pickle.dumps(fn(rank, world, *args))
        Path(folder, f"result-{rank}.pkl").write_bytes(result)
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        # Threads of a failed run may be stuck in a wait; the parent has all it needs.
        os._exit(1)
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own end now and then meets a thread of torch's that is still leaving, and
    # aborts; everything that the test wants to know is on disk.
    os._exit(0)
