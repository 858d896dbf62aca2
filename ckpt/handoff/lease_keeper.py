"""Keeps the leases of what is served alive, whatever else the process is busy with."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from ckpt.errors import CkptError, NoCheckpoint

log = logging.getLogger(__name__)


class LeaseBook(Protocol):
    """Where leases are written; a :class:`~ckpt.handoff.registry.Registry` is one."""

    def lease(self, v: str, holder: str, ttl_s: float) -> object:
        """Take or renew one."""
        ...

    def release(self, v: str, holder: str) -> None:
        """Give one back."""
        ...


class LeaseKeeper:
    """A thread that renews leases at a third of their time.

    A store that fails is asked again sooner; meanwhile the leases stand as they were written.

    Args:
        book: the root.
        holder: in whose name; unique to this process.
        ttl_s: seconds for which a lease lasts.
        on_failure: told of every failed request.
    """

    def __init__(
        self,
        book: LeaseBook,
        holder: str,
        ttl_s: float,
        on_failure: Callable[[], object] = lambda: None,
    ) -> None:
        self._book, self._holder, self._ttl_s = book, holder, ttl_s
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._kept: frozenset[str] = frozenset()
        self._taken: str | None = None
        self._gone: set[str] = set()
        self._renewed: dict[str, float] = {}
        self._ours: set[str] = set()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ckpt-leases", daemon=True)

    def start(self) -> None:
        """Begin to renew."""
        self._thread.start()

    def stop(self) -> None:
        """Renew no more; what is held runs out by itself, for the engines still serve it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def take(self, name: str) -> None:
        """Take a lease now, before a version is copied.

        It is held beside those of :meth:`keep` until another one is taken, or :meth:`drop`.

        Raises:
            NoCheckpoint: the version is gone.
            StorageError: the store failed.
        """
        self._book.lease(name, self._holder, self._ttl_s)
        with self._changed:
            self._ours.add(name)
            self._renewed[name] = time.monotonic()
            self._taken = name
            self._changed.notify_all()

    def drop(self, name: str) -> None:
        """What was taken came to nothing."""
        with self._changed:
            if self._taken == name:
                self._taken = None
                self._changed.notify_all()

    def keep(self, names: Iterable[str]) -> None:
        """Say which versions are in use from now on; the others' leases are given back."""
        wanted = frozenset(names)
        with self._changed:
            if wanted != self._kept:
                self._kept = wanted
                self._changed.notify_all()

    def _wanted(self) -> frozenset[str]:
        return self._kept if self._taken is None else self._kept | {self._taken}

    def ages(self) -> dict[str, float]:
        """Seconds since each lease in use was renewed; infinite for one that never was.

        Versions that are gone from the root have none.
        """
        now = time.monotonic()
        with self._changed:
            return {
                name: now - self._renewed[name] if name in self._renewed else float("inf")
                for name in sorted(self._wanted() - self._gone)
            }

    def _run(self) -> None:
        interval, hurry = self._ttl_s / 3, self._ttl_s / 12
        tried: dict[str, float] = {}
        while True:
            with self._changed:
                if self._stopped:
                    return
                wanted = self._wanted()
                extra = self._ours - wanted
            now = time.monotonic()
            failed = [name for name in extra if not self._release(name)]
            for name in wanted:
                if now - self._renewed.get(name, -interval) >= interval:
                    if now - tried.get(name, -hurry) < hurry:
                        continue
                    tried[name] = now
                    if not self._renew(name):
                        failed.append(name)
            with self._changed:
                self._gone &= wanted
            tried = {name: when for name, when in tried.items() if name in wanted}
            with self._changed:
                if not self._stopped and self._wanted() == wanted:
                    self._changed.wait(hurry if failed or wanted else None)

    def _renew(self, name: str) -> bool:
        try:
            self._book.lease(name, self._holder, self._ttl_s)
        except NoCheckpoint as error:
            if name not in self._gone:
                log.warning("%s is in use here and gone from the root: %s", name, error)
            with self._changed:
                self._gone.add(name)
            return True
        except CkptError as error:
            self._on_failure()
            log.warning("cannot renew the lease of %s, trying again: %s", name, error)
            return False
        with self._changed:
            self._ours.add(name)
            self._gone.discard(name)
            self._renewed[name] = time.monotonic()
        return True

    def _release(self, name: str) -> bool:
        try:
            self._book.release(name, self._holder)
        except CkptError as error:
            self._on_failure()
            log.warning("cannot give the lease of %s back, trying again: %s", name, error)
            return False
        with self._changed:
            self._ours.discard(name)
            self._renewed.pop(name, None)
        return True
