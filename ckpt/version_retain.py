"""Which versions stay, decided by names: only the newest ones are read.

The newest whole versions of a run stay, however many there are to look through to find
them; below them a version goes unread, unless it is pinned or in use.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .claim import read_claim
from .commit import newest_epoch
from .errors import DamagedError
from .holds import Holds, hold, remove_unless_held
from .layout import (
    ADAPTERS,
    MANIFEST,
    TRASH_PREFIX,
    claim_path,
    parse_tmp_version_dir,
    parse_version_name,
    target_dir,
    version_dir,
    version_name,
)
from .storage import Entry, Storage
from .versions import VersionEntry, VersionState, names_in, version_entry

REMAINS_AGE_S: Final = 24 * 3600.0
"""An unfinished version of a writer that was superseded goes once its claim is this old."""


@dataclass(frozen=True, slots=True)
class VersionFate:
    """What retention decides about one version, or about what a dead writer left of one.

    Attributes:
        entry: the version; ``unread`` if its place alone decided.
        keep: whether it stays.
        reason: why; for people.
        highest: nobody has taken a higher number, so that the claim has to stay.
    """

    entry: VersionEntry
    keep: bool
    reason: str
    highest: bool


def review_versions(
    storage: Storage, keep: int, run: str | None = None, *, whole: Collection[str] = ()
) -> list[VersionFate]:
    """What would become of every version now; deletes nothing.

    Costs a listing of the versions, the pins and the leases each, the reads of the versions that
    stay for being new, and one look each at what is leased or (on an object store) goes.

    Args:
        storage: the root.
        keep: number of newest whole versions of each run that stay.
        run: only versions of that name, or None for all.
        whole: names of versions that are known to be whole and need no read.

    Returns:
        Fates by run and number, oldest first.

    Raises:
        StorageError: the store failed.
    """
    entries = storage.list(ADAPTERS)
    judge = _Judge(storage, keep, whole)
    numbers: dict[str, dict[int, bool]] = {}
    for (name, number), is_dir in names_in(entries, run).items():
        numbers.setdefault(name, {})[number] = is_dir
    fates: list[VersionFate] = []
    for name, found in numbers.items():
        fates += reversed(list(judge.versions(name, found)))
    for entry in _unfinished(entries, run):
        highest = entry.number == max(numbers.get(entry.run, [entry.number]))
        fates.append(judge.remains(entry, highest=highest))
    return fates


class _Judge:
    """Decides about the versions of a root as they are at one moment."""

    def __init__(self, storage: Storage, keep: int, whole: Collection[str]) -> None:
        self._storage = storage
        self._keep = keep
        self._whole = whole
        self._holds = Holds(storage)
        self._epoch: int | None = None

    def versions(self, run: str, numbers: Mapping[int, bool]) -> Iterator[VersionFate]:
        """The fates of a run's numbers, newest first; for each, whether it has a directory."""
        counted, top = 0, max(numbers)
        for number in sorted(numbers, reverse=True):
            if counted == self._keep:
                yield self._older(run, number, is_dir=numbers[number])
                continue
            if not numbers[number]:
                continue  # a claim: its writer is at work, or died a short while ago
            known = version_name(run, number) in self._whole
            entry = _named(run, number) if known else version_entry(self._storage, run, number)
            if known or entry.state == "committed":
                counted += 1
                reason = f"among the newest {self._keep}"
                yield VersionFate(entry, True, reason, number == top)
            elif entry.state == "damaged":
                reason = "damaged: not counted, left alone"
                yield VersionFate(entry, True, reason, number == top)
            else:
                yield self.remains(entry, highest=number == top)

    def _older(self, run: str, number: int, *, is_dir: bool) -> VersionFate:
        """The fate of a number that is not new enough to stay; others are above it."""
        if not is_dir:
            reason = "a number that was taken and not used"
            return VersionFate(_named(run, number, "claimed"), False, reason, highest=False)
        entry = _named(run, number)
        if not self._storage.has_rename and not self._storage.exists(f"{entry.path}/{MANIFEST}"):
            return self.remains(_named(run, number, "claimed"), highest=False)
        held = self._holds.of(entry.name)
        reason = held or f"not among the newest {self._keep}"
        return VersionFate(entry, held is not None, reason, highest=False)

    def remains(self, entry: VersionEntry, *, highest: bool) -> VersionFate:
        """The fate of a version that was begun and not committed."""
        try:
            claim = read_claim(self._storage, entry.run, entry.number)
        except DamagedError:
            claim = None
        dead = claim is not None and claim.age_s() > REMAINS_AGE_S and claim.epoch < self._newest()
        reason = "left by a writer that is gone" if dead else "unfinished: its writer may be alive"
        return VersionFate(entry, not dead, reason, highest)

    def _newest(self) -> int:
        if self._epoch is None:
            self._epoch = newest_epoch(self._storage)
        return self._epoch


def apply_fate(storage: Storage, fate: VersionFate) -> str | None:
    """Delete a version that is not to stay; a hold that was set a moment ago still counts.

    Returns:
        None once it is deleted, or what keeps it.

    Raises:
        StorageError: the store failed.
    """
    entry = fate.entry
    if fate.keep:
        return fate.reason
    if entry.state == "claimed":
        storage.delete_tree(entry.path)
    else:
        held = remove_unless_held(storage, entry.name)
        if held is not None:
            return held
    if not fate.highest:
        storage.delete(claim_path(entry.run, entry.number))
    return None


def put_back_trash(storage: Storage) -> None:
    """Settle deletions of versions that a kill cut short: what is held returns, the rest goes.

    Raises:
        StorageError: the store failed.
    """
    for item in storage.list(ADAPTERS):
        name = item.name.removeprefix(TRASH_PREFIX)
        if name == item.name or parse_version_name(name) is None:
            continue
        trash = f"{ADAPTERS}/{item.name}"
        if hold(storage, name) is None:
            storage.delete_tree(trash)
        elif not storage.list(target_dir(name)):
            storage.rename_dir(trash, target_dir(name))


def _named(run: str, number: int, state: VersionState = "unread") -> VersionEntry:
    name, path = version_name(run, number), version_dir(run, number)
    return VersionEntry(name, run, number, path, state, None)


def _unfinished(entries: Sequence[Entry], run: str | None) -> list[VersionEntry]:
    """Versions that are being written under a temporary name, or were (POSIX)."""
    found = []
    for item in entries:
        name = parse_tmp_version_dir(item.name) if item.is_dir else None
        pair = None if name is None else parse_version_name(name)
        if name is not None and pair is not None and run in (None, pair[0]):
            path = f"{ADAPTERS}/{item.name}"
            found.append(VersionEntry(name, *pair, path, "claimed", None))
    return found
