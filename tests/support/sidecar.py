"""``ckpt sync`` as a process: forked from a warm server, so that a start costs little."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.warm_start import start

SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(what: Callable[[], object], seconds: float = SECONDS, why: object = "") -> None:
    """Until something is true; fails after a time."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"still not after {seconds} s: {why}"
        time.sleep(0.02)


class SidecarProcess:
    """One sidecar over its lives.

    Args:
        root: path or URL.
        engines: addresses.
        home: a directory for its cache and its log.
        options: more of the command line.
    """

    def __init__(self, root: str | Path, engines: list[str], home: Path, *options: str) -> None:
        self.port = free_port()
        self.cache, self.log_file = home / "cache", home / "sidecar.log"
        engine = [part for address in engines for part in ("--engine", address)]
        self.argv = [
            "ckpt",
            "sync",
            str(root),
            "--run",
            "run7",
            *engine,
            "--cache",
            str(self.cache),
        ]
        self.argv += ["--listen", f"127.0.0.1:{self.port}", "--check", "0.1", "--poll", "0.05"]
        self.argv += list(options)
        self.process: Any = None

    def __enter__(self) -> SidecarProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join()

    def start(self, **environment: str) -> None:
        self.process = start(_main, self.argv, str(self.log_file), environment=environment)

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        os.kill(self.process.pid, signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        self.process.join(SECONDS)
        assert self.process.exitcode is not None, "it does not end"
        return self.process.exitcode

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def get(self, path: str) -> tuple[int, str]:
        """Status and body; status 0 if nothing answers."""
        url = f"http://127.0.0.1:{self.port}{path}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def serves(self, name: str) -> bool:
        """Whether it is ready with that version."""
        status, body = self.get("/readyz")
        return status == 200 and json.loads(body)["version"] == name

    def until_serves(self, name: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.serves(name):
            alive = self.process.is_alive()
            assert alive, f"it ended: {self.log}"
            assert time.monotonic() < deadline, f"{self.get('/readyz')}\n{self.log}"
            time.sleep(0.02)

    def metric(self, name: str) -> float:
        """One sample of /metrics without labels."""
        for line in self.get("/metrics")[1].splitlines():
            if line.startswith(f"ckpt_sync_{name} "):
                return float(line.rpartition(" ")[2])
        raise KeyError(name)

    def cached(self) -> list[str]:
        """What lies in the cache, whole or not, locks and marks apart."""
        names = [item.name for item in self.cache.iterdir()] if self.cache.exists() else []
        return sorted(name for name in names if name not in {".lock", ".root"})


def _main(argv: list[str], log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    from ckpt.cli import main
    from ckpt.storage import faultpoints

    faultpoints.forget()
    sys.argv = argv
    with contextlib.suppress(SystemExit):
        try:
            main()
        except SystemExit as stop:
            sys.stderr.flush()
            os._exit(stop.code if isinstance(stop.code, int) else 1)
