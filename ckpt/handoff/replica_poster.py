"""Tells the root which engine serves what, on a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from ckpt.envelope import utc_now
from ckpt.errors import CkptError
from ckpt.layout import replica_path
from ckpt.storage import Storage

from .replica_record import EngineRecord, ReplicaRecord, read_replicas
from .report import HandoverReport
from .sync_status import SyncStatus

LOCAL_LOOK_S: Final = 1.0
REMOTE_LOOK_S: Final = 10.0
"""Between two looks at the status; only a change is written."""
EVERY_S: Final = 60.0
"""Without a change it is written again after this long, to show that the sidecar lives."""
FORGET_S: Final = 7 * 24 * 3600.0
"""Records of sidecars that are gone are deleted after this long."""
STOP_SECONDS: Final = 3.0

log = logging.getLogger(__name__)


class ReplicaPoster:
    """Writes a sidecar's record when it changes, and now and then.

    A store that fails is asked again with the next look; nobody waits for it but :meth:`stop`.

    Args:
        storage: the root.
        status: what the sidecar knows.
        run: what it serves.
        holder: in whose name it holds leases.
        look_s: seconds between two looks at the status; by default what suits the store.
    """

    def __init__(
        self,
        storage: Storage,
        status: SyncStatus,
        *,
        run: str,
        holder: str,
        look_s: float | None = None,
    ) -> None:
        self._storage, self._status = storage, status
        self._run, self._holder = run, holder
        local = storage.local_path("") is not None
        self._look_s = look_s or (LOCAL_LOOK_S if local else REMOTE_LOOK_S)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="ckpt-replicas", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Say that the sidecar has ended, if the store takes it in time."""
        self._stopping.set()
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        last: ReplicaRecord | None = None
        written, failed, tidied = 0.0, False, False
        while True:
            stopped = self._stopping.wait(self._look_s)
            record = self._record(stopped=stopped)
            due = time.monotonic() - written >= EVERY_S
            if (stopped or due or not record.same_as(last)) and self._root_is_there():
                try:
                    self._storage.put(replica_path(self._holder), record.to_bytes())
                    last, written, failed = record, time.monotonic(), False
                    if not tidied:
                        self._forget_old()
                        tidied = True
                except CkptError as error:
                    if not failed:
                        log.warning("cannot tell the root who serves what, trying again: %s", error)
                    failed = True
            if stopped:
                return

    def _root_is_there(self) -> bool:
        """A mistyped directory must not come into being because somebody reports to it."""
        place = self._storage.local_path("")
        return place is None or place.is_dir()

    def _record(self, *, stopped: bool) -> ReplicaRecord:
        current, newest, passed_over = self._status.summary()
        engines = tuple(
            EngineRecord(
                url,
                state.up,
                state.live,
                state.proof,
                None if state.proved is None else _iso(state.proved),
                state.problem,
            )
            for url, state in self._status.replicas().items()
        )
        return ReplicaRecord(
            holder=self._holder,
            run=self._run,
            host=socket.gethostname()[:300],
            at=utc_now(),
            every_s=EVERY_S,
            stopped=stopped,
            current=current,
            newest=newest,
            engines=engines,
            passed_over=tuple(sorted(passed_over.items())),
        )

    def _forget_old(self) -> None:
        for record in read_replicas(self._storage):
            if record.run == self._run and record.age_s() > FORGET_S:
                self._storage.delete(replica_path(record.holder))


class HandoverBoard:
    """Tells the root what a hand-over in this process did, for trainers that drive engines.

    Give it to :class:`~ckpt.handoff.handover.Handover` as ``on_report``. Nobody waits for the root.

    Args:
        storage: the root.
        run: what is served.
        holder: in whose name leases are held.
        engines: addresses of the replicas.
        look_s: as for :class:`ReplicaPoster`.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        run: str,
        holder: str,
        engines: Sequence[str],
        look_s: float | None = None,
    ) -> None:
        self._status = SyncStatus(run, holder, engines)
        self._poster = ReplicaPoster(storage, self._status, run=run, holder=holder, look_s=look_s)
        self._began = False

    def __call__(self, report: HandoverReport) -> None:
        """Take a report over; the first one begins the writing."""
        if report.live:
            self._status.serves(report.version)
        for item in report.replicas:
            if item.state == "untried":
                continue
            proven = item.state == "proven"
            self._status.replica(item.url, up=item.stage not in ("load", "room") or proven)
            if not proven:
                self._status.replica(item.url, problem=item.reason or item.state)
                if report.live:
                    self._status.replica(item.url, live=None)
                continue
            evidence = item.evidence
            self._status.replica(item.url, live=report.version, problem=None, proved=time.time())
            self._status.replica(item.url, proof=None if evidence is None else evidence.by)
        if not self._began:
            self._began = True
            self._poster.start()

    def stop(self) -> None:
        """Say that nothing is handed over any more."""
        if self._began:
            self._poster.stop()


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
