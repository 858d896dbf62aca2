"""Child processes with a log, a deadline and a sure end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05


class ChildFailed(RuntimeError):
    """A child ended badly or too late; the message holds the end of its log."""


class Child:
    """One child process in a session of its own, its output in a file.

    Use it as a context manager: leaving the block ends the child and all that it started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str],
        stdout: Path | None = None,
    ) -> None:
        """Start the child.

        Args:
            command: the program and its arguments; no shell takes part.
            log: file that takes stderr, and stdout too unless that has a file of its own.
            env: the whole environment.
            stdout: file that takes stdout.
        """
        self.log = log
        self._name = log.stem
        log.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            errors = stack.enter_context(log.open("wb"))
            out = errors if stdout is None else stack.enter_context(stdout.open("wb"))
            self._process = subprocess.Popen(  # noqa: S603 - our own argument list, no shell
                list(command),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                env=dict(env),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the child itself."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait(self, timeout: float) -> int:
        """Exit status within ``timeout`` seconds.

        Raises:
            ChildFailed: it is still running.
        """
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired as err:
            msg = f"{self._name} was still running after {timeout:.0f} s\n{self.tail()}"
            raise ChildFailed(msg) from err

    def succeed(self, timeout: float) -> None:
        """Wait for exit status 0.

        Raises:
            ChildFailed: another status, or too late.
        """
        status = self.wait(timeout)
        if status != 0:
            msg = f"{self._name} ended with status {status}\n{self.tail()}"
            raise ChildFailed(msg)

    def until(self, ready: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll until ``ready()``, for as long as the child lives.

        Raises:
            ChildFailed: the child ended first, or the time ran out.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if self._process.poll() is not None:
                msg = f"{self._name} ended before {what}\n{self.tail()}"
                raise ChildFailed(msg)
            if time.monotonic() > deadline:
                msg = f"{self._name}: no {what} within {timeout:.0f} s\n{self.tail()}"
                raise ChildFailed(msg)
            time.sleep(_POLL_SECONDS)

    def tail(self, lines: int = 80) -> str:
        """The end of the log; a launcher's own report alone takes 50 lines of it."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return f"--- end of {self.log} ---\n" + "\n".join(text.splitlines()[-lines:])

    def stop(self) -> None:
        """End the child and its descendants: politely first, by SIGKILL where that is ignored.

        A launcher puts its workers into sessions of their own, so that the child's process
        group does not reach them; they are found by their parents before anything is sent.
        """
        below = descendants(self._process.pid)
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        for pid in below:
            _send(pid, signal.SIGKILL)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Process ids below ``pid``, from /proc; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # Fields after the name, which is in brackets and may hold anything.
            fields = entry.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    todo = [pid]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child)
    return found


def run_child(command: Sequence[str], *, log: Path, env: Mapping[str, str], timeout: float) -> str:
    """Run a child to its end and return what it wrote to stdout.

    Raises:
        ChildFailed: it did not succeed in time.
    """
    answer = log.with_suffix(".out")
    with Child(command, log=log, env=env, stdout=answer) as child:
        child.succeed(timeout)
    return answer.read_text(encoding="utf-8")


def torchrun(world: int, module_args: Sequence[str]) -> list[str]:
    """Command line that starts ``python -m <module_args>`` on ``world`` local ranks."""
    return [
        sys.executable, "-m", "torch.distributed.run",
        "--nnodes=1", f"--nproc-per-node={world}",
        # Port 0: the launcher picks a free one; loopback only.
        "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1",
        "-m", *module_args,
    ]  # fmt: skip
