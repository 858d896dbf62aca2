"""The roots of a service: each with its store, its watcher, and threads of its own.

A store may hang. Its requests run in the threads of its root alone, and callers are told to try
again after a bounded time, so that one root costs the others nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TypeVar

from fastapi import HTTPException, Request

from ckpt.errors import CkptError
from ckpt.handoff import Registry
from ckpt.storage import open_storage

from .config import RootSpec, ServiceConfig
from .jobs.records import JobBook
from .jobs.runner import JobRunner
from .listings import Listings
from .metrics import ServiceMetrics
from .watch import RootWatcher

THREADS: Final = 16
"""Requests to one store at a time; more wait for their turn."""

STOP_S: Final = 3.0
"""For jobs to be let go of."""

T = TypeVar("T")


class ServedRoot:
    """One root.

    Args:
        spec: its name and place.
        config: of the service.
        metrics: of the service.

    Raises:
        ConfigError, StorageError: it cannot be opened.
    """

    def __init__(self, spec: RootSpec, config: ServiceConfig, metrics: ServiceMetrics) -> None:
        self.name = spec.name
        self.storage = open_storage(spec.url, spec.storage_options)
        self.registry = Registry(self.storage)
        self.jobs = JobRunner(
            spec.name,
            JobBook(self.storage),
            workers=config.job_workers,
            timeout_s=config.job_timeout_s,
            metrics=metrics,
        )
        self.listings = Listings(self.storage, self.jobs.book.verified)
        self._timeout_s = config.limits.store_s
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix=f"ckpt-{spec.name}")
        self._looker = ThreadPoolExecutor(1, thread_name_prefix=f"ckpt-look-{spec.name}")
        self.watcher = RootWatcher(
            spec.name,
            self.storage,
            self._look,
            poll_s=config.poll_s,
            submit=self._pool.submit,
            metrics=metrics,
        )

    @property
    def url(self) -> str:
        """Where it lies, without credentials."""
        return self.storage.url

    async def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function that asks the store.

        Raises:
            TimeoutError: it takes too long; its thread goes on, and its result is dropped.
        """
        return await self._run(self._pool, function, *args)

    async def _look(self, function: Callable[[], Any]) -> Any:
        # A thread of its own: looks wait neither for listings nor for downloads.
        return await self._run(self._looker, function)

    async def _run(self, pool: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
        running = asyncio.get_running_loop().run_in_executor(pool, function, *args)
        async with asyncio.timeout(self._timeout_s):
            return await running

    async def close(self) -> None:
        """Let those who wait go, and the store."""
        await self.watcher.close()
        await asyncio.to_thread(self.jobs.stop, STOP_S)
        for pool in (self._pool, self._looker):
            pool.shutdown(wait=False, cancel_futures=True)
        self.storage.close()


class Roots:
    """All roots of a service, by name.

    Args:
        config: of the service.
        metrics: of the service.

    Raises:
        ConfigError, StorageError: a root cannot be opened.
    """

    def __init__(self, config: ServiceConfig, metrics: ServiceMetrics) -> None:
        self._roots: dict[str, ServedRoot] = {}
        for spec in config.roots:
            self._roots[spec.name] = ServedRoot(spec, config, metrics)

    def __iter__(self) -> Iterator[ServedRoot]:
        return iter(self._roots.values())

    def __len__(self) -> int:
        return len(self._roots)

    def named(self, name: str) -> ServedRoot:
        """The root of that name.

        Raises:
            HTTPException: 404.
        """
        root = self._roots.get(name)
        if root is None:
            raise HTTPException(404, "no such run is served here; /v1/runs lists them")
        return root

    async def problems(self) -> dict[str, str]:
        """What is wrong with the roots at this moment, by name; empty if all answer."""
        roots: Sequence[ServedRoot] = list(self)
        answers = await asyncio.gather(
            *(root.watcher.refresh() for root in roots), return_exceptions=True
        )
        found = {}
        for root, answer in zip(roots, answers, strict=True):
            if isinstance(answer, CkptError):
                found[root.name] = str(answer)
            elif isinstance(answer, TimeoutError):
                found[root.name] = "the store does not answer in time"
            elif isinstance(answer, BaseException):
                raise answer
        return found

    def start(self) -> None:
        """Take up jobs, also those that a dead service left."""
        for root in self:
            root.jobs.start()

    async def stop_waiting(self) -> None:
        """Let long polls and event streams end."""
        await asyncio.gather(*(root.watcher.close() for root in self))

    async def close(self) -> None:
        """Close all of them."""
        await asyncio.gather(*(root.close() for root in self))


def root_of(request: Request, run: str) -> ServedRoot:
    """A dependency of operations on one root.

    Raises:
        HTTPException: 404.
    """
    roots: Roots = request.app.state.roots
    return roots.named(run)
