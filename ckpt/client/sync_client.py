"""The client for programs that wait."""

from __future__ import annotations

import time
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from ckpt.errors import HandoffTimeout, StorageError
from ckpt.handoff import Registry
from ckpt.storage.http_session import pause_s
from ckpt.storage.http_store import ServedStorage
from ckpt.wire import (
    ExportRow,
    JobRow,
    LeaseRow,
    PinRow,
    RunRow,
    StepDetail,
    StepRow,
    VersionDetail,
    VersionRow,
)

from . import calls
from .calls import Call
from .events import QUIET_S, Event, EventParser

T = TypeVar("T")

PAGE: Final = 500
JOB_LOOK_S: Final = 0.2
LONGEST_JOB_LOOK_S: Final = 2.0


class Client:
    """What a service says of one run.

    Args:
        url: address of the service, or of one of its runs (``https://host:8080/runs/run7``); the
            run may be left out where a service has one.
        token: to show; else that in ``CKPT_TOKEN``, or in the file that ``CKPT_TOKEN_FILE`` names.
        token_file: a file that holds it.
        timeout_s: for one question with all its repetitions.

    Raises:
        ConfigError: an unusable address or token.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        timeout_s: float = 60.0,
        **more: Any,
    ) -> None:
        options = {"token": token, "token_file": token_file, "timeout_s": timeout_s, **more}
        given = {name: value for name, value in options.items() if value is not None}
        self._use(ServedStorage(url, given))

    @classmethod
    def over(cls, storage: ServedStorage) -> Self:
        """The client of a root that is open already, over its connections."""
        client = cls.__new__(cls)
        client._use(storage)
        return client

    def _use(self, storage: ServedStorage) -> None:
        self._storage = storage
        self.registry = Registry(self._storage)

    def __repr__(self) -> str:
        return f"Client({self._storage.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._storage.close()

    @property
    def run_id(self) -> str:
        """Name of the run in the service."""
        return self._storage.run

    def runs(self) -> list[RunRow]:
        """The roots that are served."""
        return list(self._ask(calls.runs()).runs)

    def run(self) -> RunRow:
        """The run itself."""
        return self._ask(calls.run(self.run_id))

    def steps(self, *, newest: int | None = None) -> Iterator[StepRow]:
        """Steps, newest first, page by page as they are asked for."""
        before, left = None, newest
        while left is None or left > 0:
            limit = PAGE if left is None else min(PAGE, left)
            page = self._ask(calls.steps(self.run_id, before, limit))
            yield from page.steps
            before = page.next
            left = None if left is None else left - len(page.steps)
            if before is None:
                return

    def step(self, number: int | None = None, *, epoch: int | None = None) -> StepDetail:
        """One step down to its tensors; by default the newest whole one."""
        return self._ask(calls.step(self.run_id, number, epoch))

    def versions(
        self, *, run_name: str | None = None, newest: int | None = None
    ) -> Iterator[VersionRow]:
        """Published versions, newest first, page by page as they are asked for."""
        before, left = None, newest
        while left is None or left > 0:
            limit = PAGE if left is None else min(PAGE, left)
            page = self._ask(calls.versions(self.run_id, run_name, before, limit))
            yield from page.versions
            before = page.next
            left = None if left is None else left - len(page.versions)
            if before is None:
                return

    def version(self, name: str) -> VersionDetail:
        """One committed version."""
        return self._ask(calls.version(self.run_id, name))

    def latest(self, run_name: str | None = None) -> VersionDetail:
        """The newest whole version.

        Raises:
            NoCheckpoint: there is none yet.
        """
        return self._ask(calls.latest(self.run_id, run_name))

    def wait(
        self,
        newer_than: str | int | None = None,
        *,
        timeout_s: float,
        run_name: str | None = None,
    ) -> VersionDetail:
        """The newest version above another, as soon as there is one.

        Raises:
            HandoffTimeout: none in time.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            found = self._maybe(calls.wait(self.run_id, newer_than, run_name, min(left, 30.0)))
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                msg = f"no newer version at {self._storage.url} within {timeout_s:g} s"
                raise HandoffTimeout(msg)

    def events(
        self,
        *,
        newer_than: str | int | None = None,
        run_name: str | None = None,
        steps: bool = False,
    ) -> Iterator[Event]:
        """What becomes new, for ever; a lost connection is made again and misses nothing.

        Args:
            newer_than: also versions above this one that are there already.
            run_name: only versions of that run.
            steps: also steps.

        Raises:
            CkptError: what makes no sense to ask again.
        """
        since, attempt = newer_than, 0
        while True:
            parser = EventParser()
            params = {"newer_than": since, "run_name": run_name, "steps": str(steps).lower()}
            try:
                path = f"/v1/runs/{self.run_id}/events"
                with self._storage.session.stream(path, params, QUIET_S) as answer:
                    for line in answer.iter_lines():
                        for event in parser.feed(line):
                            attempt, since = 0, parser.last_id or since
                            yield event
            except StorageError:
                if attempt > 20:
                    raise
            time.sleep(pause_s(attempt))
            attempt += 1

    def leases(self, version: str | None = None) -> list[LeaseRow]:
        """Who uses a version, or all of them."""
        return list(self._ask(calls.leases(self.run_id, version)).leases)

    def lease(self, version: str, holder: str, ttl_s: float) -> LeaseRow:
        """Use a version for so many seconds from now on; again renews."""
        return self._ask(calls.lease(self.run_id, version, holder, ttl_s))

    def release(self, version: str, holder: str) -> None:
        """Give a lease back."""
        self._maybe(calls.release(self.run_id, version, holder))

    def pins(self) -> list[PinRow]:
        """What is pinned, and why."""
        return list(self._ask(calls.pins(self.run_id)).pins)

    def pin(self, name: str, note: str = "") -> PinRow:
        """Keep a step or version until it is unpinned."""
        return self._ask(calls.pin(self.run_id, name, note))

    def unpin(self, name: str) -> None:
        """Take a pin away.

        Raises:
            NoCheckpoint: it was not pinned.
        """
        self._maybe(calls.unpin(self.run_id, name))

    def download(self, version: str | int, into: str | PathLike[str]) -> Path:
        """A version as a directory here: every byte verified, and it appears at once."""
        return self.registry.fetch(version, into)

    def export(
        self, step: int | None = None, *, epoch: int | None = None, dtype: str = "bfloat16"
    ) -> JobRow:
        """Have the adapter of a step (by default the newest) written into the root's exports."""
        body = {"kind": "export", "step": step, "epoch": epoch, "dtype": dtype}
        return self._ask(calls.start_job(self.run_id, body))

    def exports(self) -> list[ExportRow]:
        """Adapters that jobs exported."""
        return list(self._ask(calls.exports(self.run_id)).exports)

    def verify(
        self,
        *,
        step: int | None = None,
        epoch: int | None = None,
        version: str | None = None,
    ) -> JobRow:
        """Have every byte of all steps and versions, or of one, read and compared."""
        body = {"kind": "verify", "step": step, "epoch": epoch, "version": version}
        return self._ask(calls.start_job(self.run_id, body))

    def prune(self, *, confirm: str | None = None, **rules: Any) -> JobRow:
        """Have deleted what no rule keeps; without ``confirm``, only have it listed.

        Args:
            confirm: the ``plan`` in the result of a dry run with the same rules.
            **rules: ``keep_latest``, ``every``, ``best``, ``metric``, ``mode``,
                ``keep_versions``, ``run_name``.
        """
        body = {"kind": "prune", **rules, "confirm": confirm}
        return self._ask(calls.start_job(self.run_id, body))

    def jobs(self, limit: int = 50) -> list[JobRow]:
        """The newest jobs, without their results."""
        return list(self._ask(calls.jobs(self.run_id, limit)).jobs)

    def job(self, job_id: str) -> JobRow:
        """A job with its progress, and its result once it has ended."""
        return self._ask(calls.job(self.run_id, job_id))

    def cancel(self, job_id: str) -> JobRow:
        """Ask for a job to be let be."""
        return self._ask(calls.cancel_job(self.run_id, job_id))

    def wait_job(self, job_id: str, *, timeout_s: float) -> JobRow:
        """A job once it has ended, however it did.

        Raises:
            HandoffTimeout: it has not in time; it goes on.
        """
        deadline, pause = time.monotonic() + timeout_s, JOB_LOOK_S
        while True:
            row = self.job(job_id)
            if row.finished is not None:
                return row
            if time.monotonic() >= deadline:
                raise HandoffTimeout(f"job {job_id} has not ended within {timeout_s:g} s")
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(LONGEST_JOB_LOOK_S, 1.5 * pause)

    def _ask(self, call: Call[T]) -> T:
        return call.decode(self._send(call))

    def _maybe(self, call: Call[T]) -> T | None:
        content = self._send(call)
        return call.decode(content) if content else None

    def _send(self, call: Call[T]) -> bytes:
        answer = self._storage.session.request(
            call.method,
            call.path,
            call.what,
            params=call.params,
            json=call.json,
            wait_s=call.wait_s,
            repeat=call.repeat,
        )
        return answer.content
