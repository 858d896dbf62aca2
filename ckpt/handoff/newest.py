"""The newest versions of a root, at the same cost however many there are.

A listing grows with the root. But numbers are given out one after the other, each by a claim, and
the highest claim of a run is never deleted: so whoever knows it finds the next one by asking for
one name. A look therefore asks for the next claim and for the manifests of the numbers that are
claimed and not committed. A full listing, seldom enough to be a hundredth of the time, finds what
that cannot: the first version of another run, and numbers behind a gap.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from ckpt.errors import DamagedError
from ckpt.layout import MANIFEST, claim_path, version_dir
from ckpt.storage import Storage
from ckpt.versions import VersionEntry, version_entry, version_names

from .registry import Version

LISTING_S: Final = 5.0
"""Between two full listings, at least."""
_SHARE: Final = 100.0
"""A listing that took t seconds is not repeated for this many t."""
_UNKNOWN_SHARE: Final = 10.0
_OPEN: Final = 64
"""Claims without a version that are looked at; older ones are left to the listing."""
_RECENT: Final = 256

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Run:
    """What is known of the versions of one run.

    Attributes:
        claimed: the highest number known to be taken.
        open: numbers that are taken, above the newest whole version, and not seen whole.
        newest: the newest whole version.
        recent: the last versions that were seen, oldest first.
        recalled: every number from here on is among these, or was looked at and is not whole.
    """

    claimed: int = -1
    open: set[int] = field(default_factory=set)
    newest: VersionEntry | None = None
    recent: deque[VersionEntry] = field(default_factory=lambda: deque(maxlen=_RECENT))
    recalled: int = 0


@dataclass(frozen=True, slots=True)
class _Listing:
    """By run, the numbers that were ever taken and whether each has a directory; and seconds."""

    found: dict[str, dict[int, bool]]
    took: float


@dataclass(frozen=True, slots=True)
class Seen:
    """What a look showed of one run.

    Attributes:
        newest: its newest whole version, with its manifest.
        recent: the last versions that were seen, oldest first.
    """

    newest: VersionEntry
    recent: tuple[VersionEntry, ...]

    def since(self, number: int) -> list[VersionEntry]:
        """Those of the last versions that are above a number, oldest first."""
        return [version for version in self.recent if version.number > number]


class NewestVersions:
    """Follows the newest whole version of every run of a root. For one thread at a time.

    Args:
        storage: the root.
        clock: seconds, for tests.
        submit: runs a function in another thread, as that of an executor does; looks then do not
            wait for the listings that come now and then.
    """

    def __init__(
        self,
        storage: Storage,
        clock: Callable[[], float] = time.monotonic,
        submit: Callable[[Callable[[], _Listing]], Future[_Listing]] | None = None,
    ) -> None:
        self._storage, self._clock, self._submit = storage, clock, submit
        self._pending: Future[_Listing] | None = None
        self._runs: dict[str, _Run] = {}
        self._listed = -float("inf")
        self._took = 0.0
        self._warned: set[str] = set()
        self._seen: Mapping[str, Seen] = {}

    def look(self, run: str | None = None) -> Mapping[str, Seen]:
        """Look once.

        Args:
            run: one that is asked for; if it is not known, a listing is due earlier.

        Returns:
            By run, in the order of their names; the same object as long as nothing changes.

        Raises:
            StorageError: the store failed.
        """
        since = self._clock() - self._listed
        unknown = not self._runs or (run is not None and run not in self._runs)
        if unknown and since >= _UNKNOWN_SHARE * self._took:
            self._list()
        elif self._pending is not None and self._pending.done():
            listing, self._pending = self._pending.result(), None
            self._take(listing)
        elif since >= max(LISTING_S, _SHARE * self._took) and self._pending is None:
            if self._submit is None:
                self._list()
            else:
                self._pending = self._submit(self._names)
        for name, known in list(self._runs.items()):
            self._probe(name, known)
        newest = {name: run.newest for name, run in self._runs.items() if run.newest is not None}
        if newest != {name: seen.newest for name, seen in self._seen.items()}:
            self._show()
        return self._seen

    def recall(self, run: str, number: int) -> Mapping[str, Seen]:
        """Find the versions above a number that were there before the first look.

        Costs one look at each number between, and at most 256; only those that were not looked at
        before.

        Args:
            run: of which run.
            number: a caller has it already.

        Returns:
            As :meth:`look`.

        Raises:
            StorageError: the store failed.
        """
        known = self._runs.get(run)
        if known is None or known.newest is None:
            return self._seen
        floor = max(number, known.newest.number - _RECENT)
        for older in range(known.recalled - 1, floor, -1):
            version = self._whole(run, older) if self._there(run, older) else None
            if version is not None and len(known.recent) < _RECENT:
                known.recent.appendleft(version)
            known.recalled = older
        self._show()
        return self._seen

    def _show(self) -> None:
        self._seen = {
            name: Seen(run.newest, tuple(run.recent))
            for name, run in sorted(self._runs.items())
            if run.newest is not None
        }

    def _names(self) -> _Listing:
        begun = self._clock()
        found: dict[str, dict[int, bool]] = {}
        for (run, number), is_dir in version_names(self._storage).items():
            found.setdefault(run, {})[number] = is_dir
        return _Listing(found, self._clock() - begun)

    def _list(self) -> None:
        self._pending = None  # what another thread found would be older
        self._take(self._names())

    def _take(self, listing: _Listing) -> None:
        for run in self._runs.keys() - listing.found.keys():
            del self._runs[run]
        for run, numbers in listing.found.items():
            self._settle(self._runs.setdefault(run, _Run()), run, numbers)
        self._listed, self._took = self._clock(), listing.took

    def _settle(self, known: _Run, run: str, numbers: dict[int, bool]) -> None:
        """What a listing of the run's numbers says: walks down to the newest whole one."""
        # The listing may be older than what is known: that is looked at once more.
        for number in known.open:
            numbers.setdefault(number, False)
        if known.newest is not None:
            numbers[known.newest.number] = True
        known.claimed = max(known.claimed, *numbers)
        known.newest, known.open = None, set()
        for number in sorted(numbers, reverse=True):
            version = self._whole(run, number) if numbers[number] else None
            if version is not None:
                # Newer ones that were seen before are gone, or damaged by now.
                kept = [entry for entry in known.recent if entry.number <= number]
                known.recent = deque(kept, _RECENT)
                self._found(known, version)
                return
            if len(known.open) < _OPEN:
                known.open.add(number)

    def _probe(self, run: str, known: _Run) -> None:
        if known.newest is not None and not self._there(run, known.newest.number):
            self._list()  # somebody deleted it
            return
        while self._storage.exists(claim_path(run, known.claimed + 1)):
            known.claimed += 1
            known.open.add(known.claimed)
        # A mirror brings versions without claims, so the next number may be there all the same.
        for number in sorted({*known.open, known.claimed + 1}):
            version = self._whole(run, number) if self._there(run, number) else None
            if version is not None:
                known.claimed = max(known.claimed, number)
                self._found(known, version)
        if len(known.open) > _OPEN:
            known.open = set(sorted(known.open)[-_OPEN:])

    def _found(self, known: _Run, version: VersionEntry) -> None:
        if known.newest is None or version.number > known.newest.number:
            known.newest = version
            known.open = {number for number in known.open if number > version.number}
        if not known.recent:
            known.recalled = version.number
        if not known.recent or version.number > known.recent[-1].number:
            known.recent.append(version)

    def _there(self, run: str, number: int) -> bool:
        return self._storage.exists(f"{version_dir(run, number)}/{MANIFEST}")

    def _whole(self, run: str, number: int) -> VersionEntry | None:
        entry = version_entry(self._storage, run, number)
        problem = entry.problem
        if entry.state == "committed" and entry.manifest is not None:
            try:
                Version.of(entry.manifest, self._storage.url)  # its probe can be read
                return entry
            except DamagedError as error:
                problem = str(error)
        if problem is not None and entry.name not in self._warned and self._there(run, number):
            self._warned.add(entry.name)  # once, not at every look
            log.warning("version %s is damaged and passed over: %s", entry.name, problem)
        return None
