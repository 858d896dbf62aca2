"""What became of a run's steps, as one list: what lies there, what was pruned, failed or is coming.

Steps that lie in the root come from its listing. The rest comes from the segments of the timeline,
which are hints: where they disagree with the listing, the listing counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final, Literal, TypeAlias

from ckpt.catalog import step_dirs
from ckpt.layout import STEPS, parse_step_dir, parse_tmp_step_dir, step_name
from ckpt.service.listings import Listings
from ckpt.storage import Storage
from ckpt.timeline import SaveRecord, Segment
from ckpt.timeline_store import read_segment, segment_names
from ckpt.wire import StepRow

State: TypeAlias = Literal[
    "committed", "abandoned", "damaged", "incomplete", "flying", "pruned", "failed", "skipped"
]
STATES: Final[dict[State, str]] = {
    "committed": "committed",
    "flying": "in flight",
    "damaged": "damaged",
    "failed": "failed",
    "skipped": "skipped",
    "abandoned": "abandoned",
    "incomplete": "unfinished",
    "pruned": "pruned",
}
"""Every state with the word for it."""

PAGE: Final = 120
LOCAL_S: Final = 0.5
REMOTE_S: Final = 5.0
"""What was read is shown for this long before the root is asked again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One attempt at a step.

    Attributes:
        step: its number.
        epoch: the writer's epoch, if known.
        state: what became of it.
        at: when it was committed or ended, or when it began if it is in flight; ISO 8601 or None.
        row: what the listing says, if it lies in the root.
        record: what its trainer said of it, or None.
    """

    step: int
    epoch: int | None
    state: State
    at: str | None
    row: StepRow | None = None
    record: SaveRecord | None = None

    @property
    def name(self) -> str | None:
        """Name of its directory, or None if it has none."""
        return None if self.epoch is None else step_name(self.step, self.epoch)

    @property
    def problem(self) -> str | None:
        """What is wrong with it, or what went wrong beside it."""
        said = None if self.record is None else self.record.problem
        return (self.row.problem if self.row is not None else None) or said


@dataclass(frozen=True, slots=True)
class Told:
    """What the segments say, put in order.

    Attributes:
        saves: (epoch, record) of every save and publish that ended, oldest first.
        flying: (epoch, step, since) of saves that are under way.
        pruned: names of what was deleted, with the moment.
        alive: when a trainer wrote last, or None.
    """

    saves: tuple[tuple[int | None, SaveRecord], ...]
    flying: tuple[tuple[int, int, str], ...]
    pruned: Mapping[str, str]
    alive: str | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A page of the timeline.

    Attributes:
        entries: newest first.
        records: saves and publishes of the same span that ended, oldest first.
        before: the name that asks for the page below, or None.
        total: steps that lie in the root.
        alive: when a trainer wrote last, or None.
    """

    entries: tuple[Entry, ...]
    records: tuple[SaveRecord, ...]
    before: str | None
    total: int
    alive: str | None


FEWEST: Final = 3
"""Pruned steps side by side that are shown as one row."""


def grouped(entries: Sequence[Entry]) -> list[tuple[Entry, ...]]:
    """Entries with pruned neighbours put together; all others are alone."""
    rows: list[tuple[Entry, ...]] = []
    for pruned, members in groupby(entries, key=lambda entry: entry.state == "pruned"):
        group = tuple(members)
        if pruned and len(group) >= FEWEST:
            rows.append(group)
        else:
            rows += [(entry,) for entry in group]
    return rows


def put_in_order(segments: Iterable[Segment], newest_epoch: int) -> Told:
    """What segments say; only a trainer of the newest epoch can have a save under way."""
    saves: list[tuple[int | None, SaveRecord]] = []
    flying: dict[tuple[int, int], str] = {}
    pruned: dict[str, str] = {}
    alive: str | None = None
    ended: set[str] = set()
    for segment in segments:
        for record in segment.saves:
            saves.append((segment.epoch, record))
            ended.add(record.attempt)
            pruned.update(dict.fromkeys(record.removed, record.at))
        for removal in segment.removals:
            pruned.update(dict.fromkeys(removal.names, removal.at))
        if segment.epoch is not None:
            alive = max(alive or "", segment.written)
    for segment in segments:
        if segment.epoch != newest_epoch or segment.closed:
            continue
        for one in segment.open:
            if one.kind == "save" and one.step is not None and one.attempt not in ended:
                flying[newest_epoch, one.step] = one.since
    saves.sort(key=lambda pair: pair[1].at)
    return Told(
        tuple(saves),
        tuple((epoch, step, since) for (epoch, step), since in flying.items()),
        pruned,
        alive,
    )


class TimelineReader:
    """Reads a root's timeline for pages; what does not change is read once. For many threads.

    Args:
        storage: the root.
        listings: pages of its steps.
    """

    def __init__(self, storage: Storage, listings: Listings) -> None:
        self._storage, self._listings = storage, listings
        self._lock = threading.Lock()
        self._segments: dict[tuple[str, int], Segment | None] = {}
        self._pages: dict[tuple[str | None, int], tuple[float, Timeline]] = {}
        self._keep_s = LOCAL_S if storage.has_rename else REMOTE_S

    def page(self, before: str | None, limit: int = PAGE) -> Timeline:
        """A page of the timeline, newest first.

        Args:
            before: only what is below the step of that name.
            limit: how many entries.

        Raises:
            ConfigError: ``before`` names no step.
            DamagedError: a writer's record hides which steps count.
            StorageError: the store failed.
        """
        key = (before, limit)
        with self._lock:
            at, known = self._pages.get(key, (0.0, None))
            if known is not None and time.monotonic() - at < self._keep_s:
                return known
            found = self._read(before, limit)
            if len(self._pages) > 32:
                self._pages.clear()
            self._pages[key] = (time.monotonic(), found)
            return found

    def _read(self, before: str | None, limit: int) -> Timeline:
        present = step_dirs(self._storage)
        epoch = max((pair[1] for pair in present), default=0)
        segments = self._told()
        epoch = max([epoch, *(one.epoch for one in segments if one.epoch is not None)])
        told = put_in_order(segments, epoch)
        flying = [*told.flying, *self._begun(epoch, told)]
        ceiling = None if before is None else parse_step_dir(before)
        keys = _window(present, told, flying, ceiling, limit + 1)
        more = len(keys) > limit
        keys = keys[:limit]
        here = set(present)
        count = sum(pair in here for pair in keys)
        rows: dict[tuple[int, int], StepRow] = {}
        if count or before is not None:
            page = self._listings.steps(before, max(1, count))
            rows = {(row.step, row.epoch): row for row in page.steps}
        entries = tuple(_entries(keys, rows, told, flying, here))
        return Timeline(
            entries=entries,
            records=_records(told, keys, newest=before is None, limit=limit),
            before=step_name(*keys[-1]) if more and keys else None,
            total=len(present),
            alive=told.alive,
        )

    def _told(self) -> list[Segment]:
        """The newest segments, each read again only when it has grown."""
        names = segment_names(self._storage)
        known: dict[tuple[str, int], Segment | None] = {}
        for one in names:
            key = (one.name, one.size)
            cached = key in self._segments
            # A segment that is rewritten may keep its size: until it is closed it is read again.
            old = self._segments.get(key)
            fresh = not cached or (old is not None and not old.closed and one in names[-4:])
            known[key] = read_segment(self._storage, one.name) if fresh else old
        self._segments = known
        return [segment for segment in known.values() if segment is not None]

    def _begun(self, epoch: int, told: Told) -> list[tuple[int, int, str]]:
        """Steps that are being written under a temporary name, or were (POSIX)."""
        if not self._storage.has_rename:
            return []
        ended = {record.attempt for _epoch, record in told.saves}
        found = [parse_tmp_step_dir(entry.name) for entry in self._storage.list(STEPS)]
        known = {step for _epoch, step, _since in told.flying}
        return [
            (epoch, pair[0], "")
            for pair in found
            if pair is not None and pair[1] not in ended and pair[0] not in known and epoch > 0
        ]


def _window(
    present: Sequence[tuple[int, int]],
    told: Told,
    flying: Iterable[tuple[int, int, str]],
    ceiling: tuple[int, int] | None,
    limit: int,
) -> list[tuple[int, int]]:
    """The newest (step, epoch) of all that is known, below the ceiling."""
    keys = set(present)
    keys |= {(step, epoch) for epoch, step, _since in flying}
    for epoch, record in told.saves:
        if record.kind == "save" and record.step is not None and epoch is not None:
            keys.add((record.step, epoch))
    keys |= {pair for pair in map(parse_step_dir, told.pruned) if pair is not None}
    return sorted((key for key in keys if ceiling is None or key < ceiling), reverse=True)[:limit]


def _entries(
    keys: Sequence[tuple[int, int]],
    rows: Mapping[tuple[int, int], StepRow],
    told: Told,
    flying: Sequence[tuple[int, int, str]],
    here: set[tuple[int, int]],
) -> Iterable[Entry]:
    records: dict[tuple[int, int], SaveRecord] = {}
    for epoch, record in told.saves:
        if record.kind == "save" and record.step is not None and epoch is not None:
            last = records.get((record.step, epoch))
            if last is None or last.outcome != "done":
                records[record.step, epoch] = record
    under_way = {(step, epoch): since for epoch, step, since in flying}
    committed = [row.step for row in rows.values() if row.state == "committed"]
    head = max((epoch for _step, epoch in here), default=0)
    for step, epoch in keys:
        key, name = (step, epoch), step_name(step, epoch)
        row, record_of = rows.get(key), records.get(key)
        if row is not None:
            state: State = row.state
            at = row.created or (None if record_of is None else record_of.at)
            # On an object store a step that is being written has a directory already; its trainer
            # may not have told of it yet.
            coming = epoch == head and record_of is None and step > max(committed, default=-1)
            if row.state == "incomplete" and (key in under_way or coming):
                state, at = "flying", under_way.get(key) or None
            yield Entry(step, epoch, state, at, row, record_of)
        elif key in under_way:
            yield Entry(step, epoch, "flying", under_way[key] or None)
        elif key in here:
            continue  # it went away between two looks
        elif name in told.pruned:
            yield Entry(step, epoch, "pruned", told.pruned[name], None, record_of)
        elif record_of is not None:
            lost = record_of.outcome == "done"
            state = "pruned" if lost else record_of.outcome  # type: ignore[assignment]
            yield Entry(step, epoch, state, record_of.at, None, record_of)


def _records(
    told: Told, keys: Sequence[tuple[int, int]], *, newest: bool, limit: int
) -> tuple[SaveRecord, ...]:
    """The records that the plots are made of."""
    if newest:
        return tuple(record for _epoch, record in told.saves[-limit:])
    steps = {step for step, _epoch in keys}
    found = [record for _epoch, record in told.saves if record.step in steps]
    return tuple(found[-limit:])
