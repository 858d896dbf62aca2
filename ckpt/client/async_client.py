"""The client for programs that do other things meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from ckpt.errors import CkptError, ConfigError, HandoffTimeout, StorageError
from ckpt.handoff import Registry
from ckpt.storage.http_session import (
    AGAIN,
    CONNECT_S,
    Address,
    check_options,
    error_of,
    find_token,
    headers_of,
    pause_s,
)
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
from .sync_client import JOB_LOOK_S, LONGEST_JOB_LOOK_S, PAGE

T = TypeVar("T")


class AsyncClient:
    """As :class:`~ckpt.client.Client`, with the same methods; on one event loop.

    Args:
        url: address of the service, or of one of its runs.
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
        self._options = {name: value for name, value in options.items() if value is not None}
        check_options(self._options)
        self._url, self._timeout_s = url, timeout_s
        self._address = Address.parse(url)
        self._run = self._address.run
        self._client = httpx.AsyncClient(
            headers=headers_of(find_token(self._options)),
            transport=self._options.get("transport"),
        )

    def __repr__(self) -> str:
        return f"AsyncClient({self._address.base!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def run_id(self) -> str:
        """Name of the run in the service.

        Raises:
            ConfigError: the service has several, and none was named.
        """
        if self._run is None:
            names = [row.run for row in await self.runs()]
            if len(names) != 1:
                shown = ", ".join(names[:5])
                msg = f"{self._address.base} serves {len(names)} runs ({shown}); name one"
                raise ConfigError(msg)
            self._run = names[0]
        return self._run

    async def runs(self) -> list[RunRow]:
        """The roots that are served."""
        return list((await self._ask(calls.runs())).runs)

    async def run(self) -> RunRow:
        """The run itself."""
        return await self._ask(calls.run(await self.run_id()))

    async def steps(self, *, newest: int | None = None) -> AsyncIterator[StepRow]:
        """Steps, newest first, page by page as they are asked for."""
        run, before, left = await self.run_id(), None, newest
        while left is None or left > 0:
            limit = PAGE if left is None else min(PAGE, left)
            page = await self._ask(calls.steps(run, before, limit))
            for row in page.steps:
                yield row
            before = page.next
            left = None if left is None else left - len(page.steps)
            if before is None:
                return

    async def step(self, number: int | None = None, *, epoch: int | None = None) -> StepDetail:
        """One step down to its tensors; by default the newest whole one."""
        return await self._ask(calls.step(await self.run_id(), number, epoch))

    async def versions(
        self, *, run_name: str | None = None, newest: int | None = None
    ) -> AsyncIterator[VersionRow]:
        """Published versions, newest first, page by page as they are asked for."""
        run, before, left = await self.run_id(), None, newest
        while left is None or left > 0:
            limit = PAGE if left is None else min(PAGE, left)
            page = await self._ask(calls.versions(run, run_name, before, limit))
            for row in page.versions:
                yield row
            before = page.next
            left = None if left is None else left - len(page.versions)
            if before is None:
                return

    async def version(self, name: str) -> VersionDetail:
        """One committed version."""
        return await self._ask(calls.version(await self.run_id(), name))

    async def latest(self, run_name: str | None = None) -> VersionDetail:
        """The newest whole version.

        Raises:
            NoCheckpoint: there is none yet.
        """
        return await self._ask(calls.latest(await self.run_id(), run_name))

    async def wait(
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
        run, deadline = await self.run_id(), time.monotonic() + timeout_s
        while True:
            left = max(0.0, deadline - time.monotonic())
            found = await self._maybe(calls.wait(run, newer_than, run_name, min(left, 30.0)))
            if found is not None:
                return found
            if time.monotonic() >= deadline:
                raise HandoffTimeout(f"no newer version of {run} within {timeout_s:g} s")

    async def events(
        self,
        *,
        newer_than: str | int | None = None,
        run_name: str | None = None,
        steps: bool = False,
    ) -> AsyncIterator[Event]:
        """What becomes new, for ever; see :meth:`ckpt.client.Client.events`."""
        run, since, attempt = await self.run_id(), newer_than, 0
        while True:
            parser = EventParser()
            params = {"newer_than": since, "run_name": run_name, "steps": str(steps).lower()}
            query = {name: value for name, value in params.items() if value is not None}
            timeout = httpx.Timeout(self._timeout_s, connect=CONNECT_S, read=QUIET_S)
            url = f"{self._address.base}/v1/runs/{run}/events"
            try:
                async with self._client.stream("GET", url, params=query, timeout=timeout) as answer:
                    if not answer.is_success:
                        raise error_of(answer.status_code, await answer.aread(), "events")
                    async for line in answer.aiter_lines():
                        for event in parser.feed(line):
                            attempt, since = 0, parser.last_id or since
                            yield event
            except (StorageError, httpx.TransportError) as error:
                if attempt > 20:
                    raise StorageError(f"{self._address.base} does not answer") from error
            await asyncio.sleep(pause_s(attempt))
            attempt += 1

    async def leases(self, version: str | None = None) -> list[LeaseRow]:
        """Who uses a version, or all of them."""
        return list((await self._ask(calls.leases(await self.run_id(), version))).leases)

    async def lease(self, version: str, holder: str, ttl_s: float) -> LeaseRow:
        """Use a version for so many seconds from now on; again renews."""
        return await self._ask(calls.lease(await self.run_id(), version, holder, ttl_s))

    async def release(self, version: str, holder: str) -> None:
        """Give a lease back."""
        await self._maybe(calls.release(await self.run_id(), version, holder))

    async def pins(self) -> list[PinRow]:
        """What is pinned, and why."""
        return list((await self._ask(calls.pins(await self.run_id()))).pins)

    async def pin(self, name: str, note: str = "") -> PinRow:
        """Keep a step or version until it is unpinned."""
        return await self._ask(calls.pin(await self.run_id(), name, note))

    async def unpin(self, name: str) -> None:
        """Take a pin away.

        Raises:
            NoCheckpoint: it was not pinned.
        """
        await self._maybe(calls.unpin(await self.run_id(), name))

    async def download(self, version: str | int, into: str | PathLike[str]) -> Path:
        """A version as a directory here: every byte verified, and it appears at once."""
        url = f"{self._address.base}/runs/{await self.run_id()}"
        given = {key: value for key, value in self._options.items() if key != "transport"}

        def fetch() -> Path:
            storage = ServedStorage(url, given)
            try:
                return Registry(storage).fetch(version, into)
            finally:
                storage.close()

        return await asyncio.to_thread(fetch)

    async def export(
        self, step: int | None = None, *, epoch: int | None = None, dtype: str = "bfloat16"
    ) -> JobRow:
        """Have the adapter of a step (by default the newest) written into the root's exports."""
        return await self._start(kind="export", step=step, epoch=epoch, dtype=dtype)

    async def exports(self) -> list[ExportRow]:
        """Adapters that jobs exported."""
        return list((await self._ask(calls.exports(await self.run_id()))).exports)

    async def verify(
        self,
        *,
        step: int | None = None,
        epoch: int | None = None,
        version: str | None = None,
    ) -> JobRow:
        """Have every byte of all steps and versions, or of one, read and compared."""
        return await self._start(kind="verify", step=step, epoch=epoch, version=version)

    async def prune(self, *, confirm: str | None = None, **rules: Any) -> JobRow:
        """Have deleted what no rule keeps; see :meth:`ckpt.client.Client.prune`."""
        return await self._start(kind="prune", **rules, confirm=confirm)

    async def jobs(self, limit: int = 50) -> list[JobRow]:
        """The newest jobs, without their results."""
        return list((await self._ask(calls.jobs(await self.run_id(), limit))).jobs)

    async def job(self, job_id: str) -> JobRow:
        """A job with its progress, and its result once it has ended."""
        return await self._ask(calls.job(await self.run_id(), job_id))

    async def cancel(self, job_id: str) -> JobRow:
        """Ask for a job to be let be."""
        return await self._ask(calls.cancel_job(await self.run_id(), job_id))

    async def wait_job(self, job_id: str, *, timeout_s: float) -> JobRow:
        """A job once it has ended, however it did.

        Raises:
            HandoffTimeout: it has not in time; it goes on.
        """
        deadline, pause = time.monotonic() + timeout_s, JOB_LOOK_S
        while True:
            row = await self.job(job_id)
            if row.finished is not None:
                return row
            if time.monotonic() >= deadline:
                raise HandoffTimeout(f"job {job_id} has not ended within {timeout_s:g} s")
            await asyncio.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(LONGEST_JOB_LOOK_S, 1.5 * pause)

    async def _start(self, **body: Any) -> JobRow:
        return await self._ask(calls.start_job(await self.run_id(), body))

    async def _ask(self, call: Call[T]) -> T:
        return call.decode(await self._send(call))

    async def _maybe(self, call: Call[T]) -> T | None:
        content = await self._send(call)
        return call.decode(content) if content else None

    async def _send(self, call: Call[T]) -> bytes:
        deadline = time.monotonic() + self._timeout_s + call.wait_s
        attempt = 0
        while True:
            retry_after = None
            left = max(0.1, deadline - time.monotonic())
            try:
                answer = await self._client.request(
                    call.method,
                    self._address.base + call.path,
                    params=dict(call.params),
                    json=call.json,
                    timeout=httpx.Timeout(left, connect=min(left, CONNECT_S)),
                )
                if answer.is_success:
                    return answer.content
                problem: CkptError = error_of(answer.status_code, answer.content, call.what)
                again = answer.status_code in (AGAIN if call.repeat else {429})
                retry_after = answer.headers.get("retry-after")
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                msg = f"{call.what}: {self._address.base} does not answer: {reason}"
                problem = StorageError(msg)
                never = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
                again = call.repeat or never
            pause = pause_s(attempt, retry_after)
            if not again or time.monotonic() + pause > deadline:
                raise problem
            await asyncio.sleep(pause)
            attempt += 1
