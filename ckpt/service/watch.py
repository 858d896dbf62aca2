"""One watcher for each root: all who wait for something new share its looks.

It looks while somebody waits, and whenever somebody asks for the newest version, which is then
answered by a look that began after the question: what was committed before is always seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ckpt.catalog import step_dirs
from ckpt.errors import CkptError, ConfigError, StorageError
from ckpt.handoff.newest import NewestVersions, Seen
from ckpt.handoff.registry import REMOTE_POLL_S
from ckpt.layout import STEPS, step_name
from ckpt.storage import Storage
from ckpt.versions import VersionEntry

from .metrics import ServiceMetrics

LOCAL_POLL_S: Final = 0.005
STEPS_S: Final = 1.0
"""Between two looks at the steps of a directory, at least; a directory that did not change is
not listed."""
REMOTE_STEPS_S: Final = 5.0
_SHARE: Final = 50.0
_TICK_NS: Final = 100_000_000
FAILED_S: Final = 1.0
"""Until the next look after one that failed."""

T = TypeVar("T")
Call = Callable[[Callable[[], Any]], Awaitable[Any]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Change:
    """What a root shows that it did not show before.

    Attributes:
        kind: ``version`` or ``step``.
        name: a version's name, or that of a step's directory.
        entry: the version, for that kind.
        step: number and epoch, for that kind.
    """

    kind: str
    name: str
    entry: VersionEntry | None = None
    step: tuple[int, int] | None = None


class RootWatcher:
    """Watches one root, on the event loop that uses it first.

    Args:
        name: the root's name.
        storage: the root's store.
        call: runs a blocking function off the loop, with a bound on its time.
        poll_s: seconds between two looks while somebody waits.
        submit: an executor's, for listings that no look should wait for.
        metrics: told about the looks.
    """

    def __init__(
        self,
        name: str,
        storage: Storage,
        call: Call,
        *,
        poll_s: float | None,
        submit: Callable[..., Any] | None = None,
        metrics: ServiceMetrics,
    ) -> None:
        self._name, self._storage, self._call, self._metrics = name, storage, call, metrics
        local = storage.has_rename
        self._poll_s = poll_s or (LOCAL_POLL_S if local else REMOTE_POLL_S)
        self._versions = NewestVersions(storage, submit=submit)
        self._steps = _Steps(storage, STEPS_S if local else REMOTE_STEPS_S)
        self._seen: Mapping[str, Seen] = {}
        self._turn = asyncio.Event()
        self._wake = asyncio.Event()
        self._asked: list[tuple[str | None, asyncio.Future[None]]] = []
        self._waiting = 0
        self._step_waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait at this moment."""
        return self._waiting

    @property
    def runs(self) -> list[str]:
        """Names of the runs whose versions were seen, sorted."""
        return list(self._seen)

    @property
    def closed(self) -> bool:
        """Whether the service is stopping, so that nobody should wait any more."""
        return self._closed

    async def refresh(self, run: str | None = None) -> None:
        """Wait for a look that begins from now on; many callers share one.

        Raises:
            StorageError: the store failed.
            TimeoutError: it does not answer.
        """
        self._start()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked.append((run, answer))
        self._wake.set()
        await answer

    async def latest(self, run: str | None) -> VersionEntry | None:
        """The newest whole version of a run (or of the only one), by a fresh look.

        Raises:
            ConfigError: the root has versions of several runs, and none is named.
            StorageError, TimeoutError: as :meth:`refresh`.
        """
        await self.refresh(run)
        return self._newest(run)

    def only(self, run: str | None) -> str | None:
        """The run that is meant, or None if there is none yet.

        Raises:
            ConfigError: there are several, and none is named.
        """
        runs = self.runs
        if run is None and len(runs) > 1:
            msg = f"there are versions of several runs ({', '.join(runs[:5])}); name the run"
            raise ConfigError(msg)
        return run if run is not None else next(iter(runs), None)

    def newest_of_all(self) -> dict[str, VersionEntry]:
        """The newest versions as of the last look, by run."""
        return {run: seen.newest for run, seen in self._seen.items()}

    def _newest(self, run: str | None) -> VersionEntry | None:
        seen = self._seen.get(self.only(run) or "")
        return None if seen is None else seen.newest

    async def wait(self, run: str | None, floor: int, timeout_s: float) -> VersionEntry | None:
        """The newest version above a number, as soon as there is one; None if the time is over.

        Also None as soon as the service is stopping.

        Raises:
            ConfigError: as :meth:`latest`.
            StorageError: the store failed at the first look.
        """
        deadline = time.monotonic() + timeout_s
        found = await self.latest(run)
        async with self._watching():
            while found is None or found.number <= floor:
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    return None
                turn = self._turn
                found = self._newest(run)
                if found is None or found.number <= floor:
                    await self._next(turn, left)
        return found

    async def changes(
        self, *, run: str | None, floor: int | None, steps: bool, beat_s: float
    ) -> AsyncGenerator[Change | None, None]:
        """What becomes new, from now on, until the service stops.

        A caller that takes its time skips what is no longer among the last 256 versions; nothing
        is kept for it.

        Args:
            run: only versions of that run.
            floor: also those above this number that are there already; None for none.
            steps: also steps.
            beat_s: after so long without a change, None is given.
        """
        await self.refresh(run)
        above = {name: version.number for name, version in self.newest_of_all().items()}
        name = self.only(run) if floor is not None else None
        if floor is not None and name is not None:
            above[name] = floor
            self._seen = await self._call(lambda: self._versions.recall(name, floor))
        seen_steps = await self._call(self._steps.look) if steps else frozenset()
        async with self._watching(steps=steps):
            while not self._closed:
                turn, found = self._turn, self._steps.known
                news = list(self._news(run, above))
                if steps and found is not seen_steps:
                    news += [Change("step", step_name(*p), step=p) for p in found - seen_steps]
                    seen_steps = found
                for change in news:
                    yield change
                if not news and not await self._next(turn, beat_s):
                    yield None

    def _news(self, run: str | None, above: dict[str, int]) -> Iterator[Change]:
        for name, seen in self._seen.items():
            if run in (None, name):
                for version in seen.since(above.get(name, -1)):
                    above[name] = version.number
                    yield Change("version", version.name, version)

    async def close(self) -> None:
        """Stop looking; whoever waits is told that there is nothing."""
        self._closed = True
        self._turn.set()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._fail(StorageError(f"the service of {self._name} is stopping"))

    @contextlib.asynccontextmanager
    async def _watching(self, *, steps: bool = False) -> AsyncIterator[None]:
        self._start()
        self._waiting += 1
        self._step_waiting += steps
        self._metrics.waiting.labels(self._name).set(self._waiting)
        self._wake.set()
        try:
            yield
        finally:
            self._waiting -= 1
            self._step_waiting -= steps
            self._metrics.waiting.labels(self._name).set(self._waiting)

    @staticmethod
    async def _next(turn: asyncio.Event, timeout_s: float) -> bool:
        """Whether something changed before the time was over."""
        try:
            async with asyncio.timeout(timeout_s):
                await turn.wait()
        except TimeoutError:
            return False
        return True

    def _start(self) -> None:
        if self._closed:
            raise StorageError(f"the service of {self._name} is stopping")
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._loop(), name=f"watch-{self._name}")

    async def _loop(self) -> None:
        pause: float | None = None
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            self._wake.clear()
            asked, self._asked = self._asked, []
            run = next((name for name, _answer in asked if name is not None), None)
            problem: Exception | None = None
            try:
                await self._look(run)
            except (CkptError, TimeoutError) as error:
                problem = error
            except asyncio.CancelledError:
                self._answer(asked, StorageError(f"the service of {self._name} is stopping"))
                raise
            self._metrics.looks.labels(self._name, "failed" if problem else "answered").inc()
            self._metrics.store_up.labels(self._name).set(problem is None)
            self._answer(asked, problem)
            pause = (self._poll_s if problem is None else FAILED_S) if self._waiting else None

    async def _look(self, run: str | None) -> None:
        steps = self._steps.known

        def look() -> Mapping[str, Seen]:
            if self._step_waiting:
                self._steps.look()
            return self._versions.look(run)

        seen = await self._call(look)
        if seen is self._seen and steps is self._steps.known:
            return
        self._seen = seen
        for name, version in self.newest_of_all().items():
            self._metrics.latest.labels(self._name, name).set(version.number)
        # Each turn has an event of its own: who looked before this one, and waits, hears of it.
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    @staticmethod
    def _answer(
        asked: list[tuple[str | None, asyncio.Future[None]]], problem: Exception | None
    ) -> None:
        for _run, answer in asked:
            if answer.done():
                continue  # its caller went away
            if problem is None:
                answer.set_result(None)
            else:
                answer.set_exception(problem)

    def _fail(self, problem: Exception) -> None:
        asked, self._asked = self._asked, []
        self._answer(asked, problem)


class _Steps:
    """The step directories of a root, listed only where they may have changed."""

    def __init__(self, storage: Storage, every_s: float) -> None:
        self._storage, self._every_s = storage, every_s
        self.known: frozenset[tuple[int, int]] = frozenset()
        self._next = 0.0
        self._stamp: int | None = None

    def look(self) -> frozenset[tuple[int, int]]:
        now = time.monotonic()
        if now < self._next:
            return self.known
        path = self._storage.local_path(STEPS)
        stamp = None
        if path is not None:
            try:
                stamp = path.stat().st_mtime_ns
            except FileNotFoundError:
                return self.known
            if stamp == self._stamp:
                return self.known
        found = frozenset(step_dirs(self._storage))
        # A clock of the file system ticks in milliseconds: within one tick, more may have come.
        settled = stamp is not None and time.time_ns() - stamp > _TICK_NS
        self._stamp = stamp if settled else None
        self._next = time.monotonic() + max(self._every_s, _SHARE * (time.monotonic() - now))
        if found != self.known:
            self.known = found
        return self.known
