"""Segments of the timeline in a root: read the newest, write one, delete the oldest."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .envelope import utc_now
from .errors import CkptError, DamagedError, ObjectNotFound
from .layout import METRICS, parse_segment, segment_path
from .storage import Storage
from .timeline import MAX_BYTES, MAX_NAMES, Removal, Segment

MAX_SEGMENTS: Final = 64
"""Segments that are kept: about 8 000 saves."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentName:
    """A segment's file as a listing shows it: its name, and its size, which grows as it does."""

    name: str
    began_ms: int
    size: int


def segment_names(storage: Storage, limit: int = MAX_SEGMENTS) -> list[SegmentName]:
    """The newest segments by one listing, oldest first; those that are too large are left out."""
    found = []
    for entry in storage.list(METRICS):
        parsed = None if entry.is_dir else parse_segment(entry.name)
        if parsed is not None and entry.size <= MAX_BYTES:
            found.append(SegmentName(entry.name, parsed[0], entry.size))
    return sorted(found, key=lambda one: (one.began_ms, one.name))[-limit:]


def read_segment(storage: Storage, name: str) -> Segment | None:
    """One segment, or None for a file that is gone or is none; says so in the log.

    Raises:
        StorageError: the store failed.
    """
    where = f"{storage.url}/{METRICS}/{name}"
    try:
        return Segment.from_bytes(storage.read(f"{METRICS}/{name}"), where)
    except ObjectNotFound:
        return None
    except DamagedError as error:
        log.warning("a segment of the timeline is passed over: %s", error)
        return None


def read_timeline(storage: Storage, limit: int = MAX_SEGMENTS) -> list[Segment]:
    """The newest segments that can be read, oldest first; one listing and a read for each.

    Raises:
        StorageError: the store failed.
    """
    found = (read_segment(storage, one.name) for one in segment_names(storage, limit))
    return [segment for segment in found if segment is not None]


def drop_old_segments(storage: Storage, keep: int = MAX_SEGMENTS) -> None:
    """Delete all but the newest segments.

    Raises:
        StorageError: the store failed.
    """
    names = [entry.name for entry in storage.list(METRICS) if not entry.is_dir]
    ours = sorted(name for name in names if parse_segment(name) is not None)
    for name in ours[: max(0, len(ours) - keep)]:
        storage.delete(f"{METRICS}/{name}")


def record_removal(storage: Storage, source: str, names: Sequence[str]) -> None:
    """Tell the timeline what was deleted by hand; what fails is logged, for the deletion stands.

    Args:
        storage: the root.
        source: who deleted it, for people, e.g. ``ckpt prune``.
        names: bare names of steps and versions.
    """
    if not names:
        return
    now = utc_now()
    segment = Segment(
        source=source,
        epoch=None,
        host=socket.gethostname(),
        began=now,
        written=now,
        closed=True,
        removals=(Removal(now, tuple(names[:MAX_NAMES]), len(names)),),
    )
    try:
        path = segment_path(time.time_ns() // 1_000_000, uuid.uuid4().hex)
        storage.put(path, segment.to_bytes())
        drop_old_segments(storage)
    except CkptError as error:
        log.warning("the timeline will not show what was deleted: %s", error)
