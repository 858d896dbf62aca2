"""A program of ours as a process: forked from a warm server, its streams in files."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.warm_start import start

SECONDS = 60


class CliProcess:
    """``ckpt`` with its arguments; ends with the block.

    Args:
        home: a directory for what it writes to its streams.
        arguments: of the command line.
    """

    def __init__(self, home: Path, *arguments: str) -> None:
        self.out, self.err = home / "out", home / "err"
        self._process = start(_main, ["ckpt", *arguments], str(self.out), str(self.err))

    def __enter__(self) -> CliProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def events(self) -> list[dict[str, Any]]:
        """Every line that was written whole to standard output."""
        text = self.out.read_text() if self.out.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line[-1] == "\n"]

    def until(self, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first event of which something is true; fails after a time."""
        deadline = time.monotonic() + SECONDS
        while True:
            for event in self.events():
                if true(event):
                    return event
            assert self._process.is_alive(), f"it ended: {self.err.read_text()}"
            assert time.monotonic() < deadline, self.events()
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; the exit status."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)
        self._process.join(SECONDS)
        assert self._process.exitcode is not None, "it does not end"
        return self._process.exitcode


def _main(argv: list[str], out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    from ckpt.cli import main

    sys.argv = argv
    try:
        main()
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(stop.code if isinstance(stop.code, int) else 1)
