"""Writes what saves cost into the root, on a thread of its own and never in anybody's way.

One process has one segment open. It is rewritten at most once an interval, however many saves there
were, and at the end; so an object store sees one request in so many seconds. A store that fails
or hangs costs the timeline its newest records, and nothing else: nobody waits for it but
:meth:`Recorder.close`, and that only for a short time.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

from .envelope import utc_now
from .errors import CkptError
from .layout import segment_path
from .storage import Storage
from .timeline import (
    MAX_BYTES,
    MAX_NAMES,
    MAX_OPEN,
    MAX_RECORDS,
    OpenSave,
    Removal,
    SaveRecord,
    Segment,
)
from .timeline_store import MAX_SEGMENTS, drop_old_segments

LOCAL_INTERVAL_S: Final = 2.0
REMOTE_INTERVAL_S: Final = 10.0
"""Between two writes of a segment: one request each on an object store."""
LONGEST_PAUSE_S: Final = 300.0
CLOSE_SECONDS: Final = 5.0
_FULL_BYTES: Final = MAX_BYTES // 2

log = logging.getLogger(__name__)


class Recorder:
    """The timeline's records of one process.

    Args:
        open_root: opens the root; called on the recorder's thread, so that its connections and its
            meter are not those of the saves.
        source: what this process is, for people.
        interval_s: seconds between two writes; by default what suits the store.
    """

    def __init__(
        self, open_root: Callable[[], Storage], source: str, interval_s: float | None = None
    ) -> None:
        self._open_root = open_root
        self._source = source
        self._interval = interval_s
        self._writer = uuid.uuid4().hex
        self._changed = threading.Condition()
        self._epoch: int | None = None
        self._open: dict[str, OpenSave] = {}
        self._saves: deque[SaveRecord] = deque()
        self._removals: deque[Removal] = deque()
        self._last_ms = 0
        self._began = ""
        self._path = ""
        self._dropped = 0
        self._dirty = self._closing = False
        self._thread: threading.Thread | None = None

    def begun(self, save: OpenSave, epoch: int) -> None:
        """A save was handed to the background."""
        with self._changed:
            self._epoch = epoch
            self._open[save.attempt] = save
            self._note()

    def ended(self, record: SaveRecord) -> None:
        """What became of a save."""
        with self._changed:
            self._open.pop(record.attempt, None)
            self._saves.append(record)
            self._note()

    def removed(self, names: Sequence[str]) -> None:
        """Steps and versions were deleted."""
        if not names:
            return
        with self._changed:
            self._removals.append(Removal(utc_now(), tuple(names[:MAX_NAMES]), len(names)))
            self._note()

    def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Write what is left, and give up on a store that does not take it in time."""
        with self._changed:
            self._closing = True
            self._dirty = self._dirty or self._path != ""
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                log.warning("the timeline's last records are not in the root after %g s", timeout)

    def _note(self) -> None:
        """Something is to be written (the lock is held)."""
        while len(self._saves) + len(self._removals) > 2 * MAX_RECORDS:
            (self._saves or self._removals).popleft()
            self._dropped += 1
        self._dirty = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="ckpt-timeline", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        root: Storage | None = None
        pause = self._interval if self._interval is not None else LOCAL_INTERVAL_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                self._changed.wait_for(lambda: self._closing, pause)
                last = self._closing
                if last and not self._dirty:
                    break
                self._dirty = False
                fresh = not self._path
                if fresh:
                    # Two that begin within a millisecond are two files all the same.
                    self._last_ms = max(time.time_ns() // 1_000_000, self._last_ms + 1)
                    self._path = segment_path(self._last_ms, self._writer)
                    self._began = utc_now()
                segment, data = self._encode(closed=last)
            try:
                root = root or self._open_root()
                root.put(self._path, data)
                if fresh:
                    drop_old_segments(root, MAX_SEGMENTS)
            except CkptError as error:
                if last:
                    log.warning("the timeline's last records are lost: %s", error)
                    break
                if pause <= self._pause(root):
                    log.warning("cannot write the timeline, trying again: %s", error)
                pause = min(max(2 * pause, 2 * self._pause(root)), LONGEST_PAUSE_S)
                with self._changed:
                    self._dirty = True
                continue
            pause = self._pause(root)
            if self._turn_over(segment, len(data)):
                pause = 0.0  # what is left belongs into the next one
            elif last:
                break
        if root is not None:
            root.close()

    def _pause(self, root: Storage | None) -> float:
        if self._interval is not None:
            return self._interval
        return LOCAL_INTERVAL_S if root is not None and root.has_rename else REMOTE_INTERVAL_S

    def _turn_over(self, written: Segment, size: int) -> bool:
        """Begin another segment once this one is full; whether there is something for it."""
        with self._changed:
            count = len(written.saves) + len(written.removals)
            if count < MAX_RECORDS and size <= _FULL_BYTES:
                return False
            there = {id(one) for one in (*written.saves, *written.removals)}
            for kept in (self._saves, self._removals):
                while kept and id(kept[0]) in there:
                    kept.popleft()
            self._path, self._dropped = "", 0
            left = bool(self._saves or self._removals)
            self._dirty = self._dirty or left
            return left

    def _encode(self, *, closed: bool) -> tuple[Segment, bytes]:
        """The segment as it is now, within its bounds (the lock is held)."""
        room = MAX_RECORDS
        while True:
            saves = tuple(islice(self._saves, room))
            segment = Segment(
                source=self._source,
                epoch=self._epoch,
                host=socket.gethostname()[:300],
                began=self._began,
                written=utc_now(),
                closed=closed,
                dropped=self._dropped,
                open=tuple(self._open.values())[:MAX_OPEN],
                saves=saves,
                removals=tuple(islice(self._removals, room - len(saves))),
            )
            data = segment.to_bytes()
            if len(data) <= MAX_BYTES:
                return segment, data
            room = max(1, room // 2)
