"""The half of the sidecar that watches the root: finds versions and brings them into the cache.

It runs in a thread of its own, since a store that is down can hold a request for minutes, and the
engines are not to wait for it. What it brings, it *offers*; only the newest offer counts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import (
    CacheFull,
    CkptError,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    StorageError,
    TooLargeForCache,
)
from ckpt.layout import parse_version_name, version_name
from ckpt.storage import Announcing
from ckpt.versions import version_names

from .backoff import Backoff, Setbacks
from .cache import VersionCache
from .lease_keeper import LeaseKeeper
from .registry import Registry, Version
from .sync_status import SyncStatus

FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
HURRY_S: Final = 0.03
HURRY_FOR_S: Final = 30.0
"""Between two looks, and for how long, once the claim of a version shows that it is being written.
A trainer that died leaves such a claim, too."""
ANNOUNCED_S: Final = 2.0
"""How long a service is asked to wait for a version at a time; a stop waits as long."""
FULL_PAUSE_S: Final = 1.0
"""Room in the cache comes when an engine lets go of a version: soon, as a rule."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Offer:
    """A version that lies in the cache, whole.

    Attributes:
        version: the version.
        directory: where it lies.
        seen: when its name was first seen at the root, in seconds since 1970.
        cached: when it lay in the cache.
    """

    version: Version
    directory: Path
    seen: float
    cached: float


class Watcher:
    """Watches one run of one root.

    Args:
        registry: the root.
        run: the run whose versions are served.
        cache: where they go.
        leases: takes a lease on a version before it is pulled.
        setbacks: versions that are passed over for now, shared with who tries them on engines.
        status: told what happens.
        poll_s: seconds between two looks, each of which is one listing; fewer while a version is
            being written.
        on_offer: called after every new offer.
    """

    def __init__(
        self,
        registry: Registry,
        run: str,
        cache: VersionCache,
        leases: LeaseKeeper,
        setbacks: Setbacks,
        status: SyncStatus,
        *,
        poll_s: float,
        on_offer: Callable[[], object],
    ) -> None:
        self._registry, self._run, self._cache = registry, run, cache
        self._leases, self._setbacks, self._status = leases, setbacks, status
        self._poll_s, self._on_offer = poll_s, on_offer
        self._mutex = threading.Lock()
        self._offer: Offer | None = None
        self._floor = -1
        self._highest, self._hurry_until = -1, 0.0
        self._store_up = False
        self._told_empty = False
        self._told: bytes | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="ckpt-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; :meth:`join` waits for it."""
        self._stop.set()

    def join(self, timeout_s: float) -> bool:
        """Whether the thread has ended within the time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def offer(self) -> Offer | None:
        """The version that should be served, if it is not passed over by now."""
        with self._mutex:
            if self._offer is None or self._setbacks.waiting(self._offer.version.name):
                return None
            return self._offer

    def serving(self, number: int) -> None:
        """What is live: nothing below it will be offered any more."""
        with self._mutex:
            self._floor = max(self._floor, number)

    def withdraw(self, name: str) -> None:
        """A version is passed over: the next look brings another one, or this one anew."""
        with self._mutex:
            if self._offer is not None and self._offer.version.name == name:
                self._offer = None

    @property
    def store_up(self) -> bool:
        """Whether the last look at the root was answered."""
        return self._store_up

    def look(self) -> bool:
        """Look at the root once, and offer what should be served; whether the store answered."""
        with self._mutex:
            floor = self._floor
        try:
            names = version_names(self._registry.storage, self._run)
            numbers = [number for (_run, number), has_dir in names.items() if has_dir]
            self._store_up = True
            self._expect(max((number for _run, number in names), default=-1))
            self._status.store_answered(max(numbers, default=None))
            if not numbers:
                self._tell_empty()
            for number in reversed(numbers):
                if number <= floor or self._try(version_name(self._run, number)):
                    break
        except StorageError as error:
            self._status.store_failed(" ".join(str(error).split()))
            log.warning("the root does not answer, trying again: %s", error)
            self._store_up = False
            self._offer_cached()
            return False
        return True

    def _expect(self, highest: int) -> None:
        """Note the highest number at the root, which a version has before it can be read."""
        if highest > self._highest:
            self._highest, self._hurry_until = highest, time.monotonic() + HURRY_FOR_S

    def _pause_s(self) -> float:
        """Until the next look; shorter while a version is on its way."""
        with self._mutex:
            there = self._floor if self._offer is None else self._offer.version.number
        hurry = there < self._highest and time.monotonic() < self._hurry_until
        return min(self._poll_s, HURRY_S) if hurry else self._poll_s

    def _tell_empty(self) -> None:
        """Say once that there is nothing to serve: no version yet, or a run or root misspelt."""
        if self._told_empty:
            return
        present = {run for run, _number in version_names(self._registry.storage)}
        runs = sorted(present - {self._run})
        others = f"there are versions of {', '.join(runs)}" if runs else "nor of any other run"
        log.warning(
            "no version of %s in %s yet (%s); waiting for the first",
            self._run,
            self._registry.url,
            others,
        )
        self._told_empty = True

    def _offer_cached(self) -> None:
        """While the root does not answer: the newest version that lies here whole.

        It was the newest when this node last saw the root, so engines that have lost their adapters
        serve it again.
        """
        with self._mutex:
            if self._offer is not None or self._floor >= 0:
                return
        for entry in reversed(self._cache.entries()):
            pair = parse_version_name(entry.name)
            if pair is None or pair[0] != self._run or self._setbacks.waiting(entry.name):
                continue
            manifest = self._cache.find(entry.name)
            if manifest is not None:
                log.warning("%s is taken from the cache meanwhile", entry.name)
                version = Version.of(manifest, self._registry.url)
                now = time.time()
                with self._mutex:
                    self._offer = Offer(version, self._cache.path(entry.name), now, now)
                self._on_offer()
                return

    def _try(self, name: str) -> bool:
        """Bring a version into the cache and offer it; False to try an older one.

        Raises:
            StorageError: the store failed, which says nothing of the version.
        """
        if self._setbacks.waiting(name):
            return False
        with self._mutex:
            if self._offer is not None and self._offer.version.name == name:
                return True
        seen = time.time()
        try:
            version = self._registry.get(name)
            begun = time.monotonic()
            here = self._cache.find(name) is not None
            # Side by side: neither needs the other, and both are needed before it is offered.
            with ThreadPoolExecutor(1, "ckpt-lease") as pool:
                leased = pool.submit(self._leases.take, name)
                directory = self._cache.get(self._registry, version)
                leased.result()
        except NoCheckpoint:
            self._leases.drop(name)
            return False  # not committed yet, or being deleted: neither is worth a word
        except DamagedError as error:
            self._leases.drop(name)
            self._pass_over(name, "damaged", error)
            return False
        except TooLargeForCache as error:
            self._leases.drop(name)
            self._pass_over(name, "pull", error)
            return False
        except (CacheFull, ConfigError) as error:
            self._leases.drop(name)
            self._pass_over(name, "pull", error, FULL_PAUSE_S)
            return True  # an older one would not fit any better
        if not here:
            self._status.pulled(version.bytes, time.monotonic() - begun)
            log.info("%s lies in the cache, verified", name)
        with self._mutex:
            self._offer = Offer(version, directory, seen, time.time())
        self._on_offer()
        return True

    def _pass_over(self, name: str, why: str, error: CkptError, cap_s: float | None = None) -> None:
        record = self._setbacks.add(name, " ".join(str(error).split()), cap_s)
        self._status.passed_over(why, self._setbacks.reasons())
        if record.count & (record.count - 1) == 0:  # the first time, then ever more seldom
            log.warning("%s is passed over (%d times now): %s", name, record.count, error)

    def _loop(self) -> None:
        backoff = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
        while not self._stop.is_set():
            try:
                answered = self.look()
            except Exception:  # the sidecar goes on: engines must not lose it to one surprise
                self._status.count("errors")
                log.exception("looking at the root failed in a way nothing was prepared for")
                answered = False
            if answered:
                backoff.succeeded()
                pause = self._pause_s()
            else:
                pause = backoff.failed()
            if not answered or not self._announced(pause):
                self._stop.wait(pause)

    def _announced(self, pause_s: float) -> bool:
        """Let a store that knows its newest version say when there is another one.

        Returns:
            Whether that took the place of the pause.
        """
        storage = self._registry.storage
        if not isinstance(storage, Announcing):
            return False
        with self._mutex:
            there = self._floor if self._offer is None else self._offer.version.number
        begun = time.monotonic()
        try:
            sealed = storage.newer(self._run, there, ANNOUNCED_S)
        except CkptError:
            return False  # the next look says what is wrong
        told, self._told = self._told, sealed
        # What was told before and is not wanted, since it is damaged, is no news.
        fresh = sealed is not None and sealed != told
        return fresh or time.monotonic() - begun >= pause_s
