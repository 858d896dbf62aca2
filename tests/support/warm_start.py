"""Child processes that cost milliseconds to start, because a server forks them.

A fork server imports torch and our code once, before any thread or process group exists
(:mod:`support.warm`); importing it again in every rank was most of what a test of two ranks took.
There are two servers, each with a hash seed of its own, and neighbouring ranks come from different
ones: code that lets the order of a set decide what a rank does is still found out, as it is by
ranks that are started one by one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import cast
from unittest import mock

import numpy

TESTS = Path(__file__).parents[1]
PRELOADED = ["pytest", "support.warm"]
SERVERS = 2

_servers = [forkserver.ForkServer() for _ in range(SERVERS)]


def start(
    fn: Callable[..., object],
    *args: object,
    slot: int = 0,
    environment: dict[str, str] | None = None,
    daemon: bool = False,
) -> ForkServerProcess:
    """Start ``fn(*args)`` in a process of its own, with this one's environment and search path.

    Args:
        fn: a function of a module in ``support``.
        args: passed on; must pickle. Queues and events are those of the "forkserver" context.
        slot: which of the servers forks it, e.g. the rank.
        environment: variables to set on top.
        daemon: whether it is ended with this process.
    """
    server = _servers[slot % SERVERS]
    server.set_forkserver_preload(PRELOADED)
    everything = {**os.environ, **(environment or {})}
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(everything, str(Path.cwd()), fn, args), daemon=daemon
    )
    # The server, if this call is what starts it, must find what it preloads.
    paths = [str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]
    ours = {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONHASHSEED": str(1 + slot % SERVERS),
    }
    with (
        mock.patch.dict(os.environ, ours),
        mock.patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process),
    ):
        process.start()
    return cast("ForkServerProcess", process)


def _run(
    environment: dict[str, str], folder: str, fn: Callable[..., object], args: tuple[object, ...]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    numpy.random.seed()  # random does this by itself after a fork
    fn(*args)
