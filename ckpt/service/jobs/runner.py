"""Who works at the jobs of a root: any service, each job one at a time, whoever dies.

A service that takes a job up writes a try of its own (an exclusive create) and gives signs of life.
When these end, another service, or the same one after a restart, takes the next try. Two that work
at one job all the same, because one only slept, do no harm: jobs may be done twice, and end once.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ckpt.envelope import utc_now
from ckpt.errors import CkptError
from ckpt.service.limits import Busy
from ckpt.service.metrics import ServiceMetrics
from ckpt.wire import ErrorRow, JobKind

from .records import Beat, Job, JobBook, Result
from .work import Go, Progress, clean, work

MOST_TRIES: Final = 5
"""A job that ended so many services is not taken up again."""
MOST_UNFINISHED: Final = 50
KEPT: Final = 200
"""Jobs that have ended and are still shown."""
_MESSAGE: Final = 4000

log = logging.getLogger(__name__)


class _LetGo(Exception):
    """This go at a job ends here, and the job goes on elsewhere."""


class _Cancelled(Exception):
    """Somebody asked for the job to be let be."""


class _Running:
    """A job that runs here."""

    def __init__(self, book: JobBook, job: Job, number: int, stopping: threading.Event) -> None:
        self.job, self.number = job, number
        self._stopping = stopping
        self.cancelled = threading.Event()
        self.passed_on = threading.Event()
        self.go = Go(book, job, number, Progress(self._check))

    def _check(self) -> None:
        if self.cancelled.is_set():
            raise _Cancelled
        if self.passed_on.is_set() or self._stopping.is_set():
            raise _LetGo

    def beat(self, *, stopped: bool = False) -> Beat:
        """The sign of life to give now."""
        progress = self.go.progress
        return Beat(self.number, utc_now(), progress.done, progress.total, stopped)


class JobRunner:
    """Works at the jobs of one root.

    Args:
        name: the root's name.
        book: its jobs.
        workers: jobs at one time; 0 works at none, and only records them.
        timeout_s: without a sign of life for so long, a try counts as dead.
        metrics: told what ends.
    """

    def __init__(
        self,
        name: str,
        book: JobBook,
        *,
        workers: int,
        timeout_s: float,
        metrics: ServiceMetrics,
    ) -> None:
        self._name, self.book, self._timeout_s, self._metrics = name, book, timeout_s, metrics
        self._workers = workers
        self._nonce = uuid.uuid4().hex
        self._running: dict[str, _Running] = {}
        self._ended: set[str] = set()
        self._silent: dict[tuple[str, int], float] = {}
        self._mutex = threading.Lock()
        self._stopping = threading.Event()
        self._wake = threading.Event()
        self._pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix=f"ckpt-job-{name}")
        self._thread = threading.Thread(target=self._loop, name=f"ckpt-jobs-{name}", daemon=True)

    def start(self) -> None:
        """Begin to take jobs up, also those that a dead service left."""
        if self._workers:
            self._thread.start()

    def submit(self, kind: JobKind, params: Mapping[str, Any], by: str) -> Job:
        """Record a job; whoever has room takes it up.

        Raises:
            Busy: too many are waiting.
            StorageError: the store failed.
        """
        ids = self.book.ids()
        unfinished = list(self.book.unfinished(self._ended))
        if len(unfinished) >= MOST_UNFINISHED:
            raise Busy(
                f"{len(unfinished)} jobs are waiting or running, the most there may be", 10.0
            )
        job = self.book.create(kind, params, by)
        for old in [i for i in ids if i not in set(unfinished)][:-KEPT]:
            self.book.forget(old)
        self._wake.set()
        return job

    def cancel(self, job: str, by: str) -> None:
        """Ask for a job to be let be, wherever it runs."""
        self.book.read(job)
        self.book.cancel(job, by)
        with self._mutex:
            running = self._running.get(job)
        if running is not None:
            running.cancelled.set()
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Let go of what runs here, so that another service can take it up at once."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _loop(self) -> None:
        """Give signs of life, notice cancels, take up what nobody works at."""
        while not self._stopping.is_set():
            try:
                self._beat_all()
                self._take_up()
            except CkptError as error:
                log.warning("jobs of %s: the store failed, trying again: %s", self._name, error)
            except Exception:
                log.exception("jobs of %s: nothing was prepared for this", self._name)
            self._wake.wait(self._pause_s())
            self._wake.clear()
        for running in self._snapshot():
            running.passed_on.set()

    def _pause_s(self) -> float:
        beat = self._timeout_s / 5
        return min(1.0, beat) if self._running else beat

    def _snapshot(self) -> list[_Running]:
        with self._mutex:
            return list(self._running.values())

    def _beat_all(self) -> None:
        for running in self._snapshot():
            job = running.job.id
            if self.book.cancelled(job):
                running.cancelled.set()
            if self.book.tries(job) > running.number:
                running.passed_on.set()
            else:
                self.book.beat(job, running.beat())

    def _take_up(self) -> None:
        for job in self.book.unfinished(self._ended):
            with self._mutex:
                if job in self._running:
                    continue
                room = len(self._running) < self._workers
            if not room or self._stopping.is_set():
                return
            self._try(job)

    def _try(self, job: str) -> None:
        number = self.book.tries(job)
        if number and self._alive(job, number):
            return
        mine = self.book.take(job, number + 1, self._nonce)
        if mine is None:
            return  # somebody was faster
        try:
            known = self.book.read(job)
        except CkptError as error:
            log.warning("job %s cannot be read and is left alone: %s", job, error)
            self._ended.add(job)
            return
        running = _Running(self.book, known, mine.number, self._stopping)
        self.book.beat(job, running.beat())
        with self._mutex:
            self._running[job] = running
        self._metrics.jobs_running.inc()
        self._pool.submit(self._run, running)

    def _alive(self, job: str, number: int) -> bool:
        """Whether somebody may still be at that try."""
        beat = self.book.read_beat(job)
        heard = beat is not None and beat.number == number
        if beat is not None and heard and (beat.stopped or beat.age_s() > self._timeout_s):
            return False
        who = self.book.read_try(job, number)
        # One of ours that does not run here has ended without a result.
        if who is None or who.nonce == self._nonce:
            return False
        if who.host == socket.gethostname() and not _exists(who.pid):
            return False
        if heard:
            return True
        # It was taken and nothing has been heard of it: that is the moment between two writes, for
        # which a timeout from the first look on is enough.
        first = self._silent.setdefault((job, number), time.monotonic())
        return time.monotonic() - first < self._timeout_s

    def _run(self, running: _Running) -> None:
        job, state = running.job, "failed"
        result: Mapping[str, Any] | None = None
        error: ErrorRow | None = None
        try:
            if running.number > MOST_TRIES:
                msg = f"the service died {MOST_TRIES} times while it worked at this"
                error = ErrorRow("GaveUp", msg)
            elif self.book.cancelled(job.id):
                state = "cancelled"
            else:
                result, state = work(running.go), "succeeded"
        except _Cancelled:
            state = "cancelled"
        except _LetGo:
            state = ""
        except CkptError as failure:
            error = ErrorRow(type(failure).__name__, " ".join(str(failure).split())[:_MESSAGE])
        except Exception as failure:
            log.exception("job %s failed in a way nothing was prepared for", job.id)
            error = ErrorRow("InternalError", type(failure).__name__)
        self._end(running, state, result, error)

    def _end(
        self,
        running: _Running,
        state: str,
        result: Mapping[str, Any] | None,
        error: ErrorRow | None,
    ) -> None:
        job = running.job
        try:
            if not state:
                if not running.passed_on.is_set() or self._stopping.is_set():
                    self.book.beat(job.id, running.beat(stopped=True))
                return
            if state != "succeeded":
                clean(running.go)
            done = Result(state, running.number, utc_now(), result, error)  # type: ignore[arg-type]
            self.book.finish(job.id, done)
            self.book.sweep(job.id)
            self._ended.add(job.id)
            self._metrics.jobs.labels(self._name, job.kind, state).inc()
            log.info("job %s (%s) %s", job.id, job.kind, state)
        except CkptError as failure:
            # The next try finds out how far this one came.
            log.warning("how job %s ended cannot be recorded: %s", job.id, failure)
        finally:
            with self._mutex:
                self._running.pop(job.id, None)
            self._metrics.jobs_running.dec()
            self._wake.set()


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
