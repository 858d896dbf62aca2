"""A manager's background thread: jobs in order, what is kept afterwards, and what failed.

Everything that fails here is kept and raised by the caller's next call, so that nothing is lost.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeAlias

from .arena import Arena
from .errors import ConfigError, PublishError, SaveAborted, VoteTimeout
from .handle import SaveHandle
from .job import Job
from .recorder import Recorder
from .retain import Keeper
from .save import EchoError, SavePipeline, SkippedSave
from .save_record import open_save, save_record, skipped_record
from .storage.traffic import Traffic
from .tier_group import TierGroup
from .types import SaveMetrics

logger = logging.getLogger(__name__)

Reporter: TypeAlias = Callable[[SaveMetrics], object]
Reporters: TypeAlias = Reporter | Sequence[Reporter] | None
"""Who is told what a save cost."""


def reporters(on_metrics: Reporters) -> tuple[Reporter, ...]:
    """The reporters as they were given: none, one, or several.

    Raises:
        ConfigError: something that cannot be called.
    """
    found: Any = () if on_metrics is None else on_metrics
    each: tuple[Any, ...] = (found,) if callable(found) else tuple(found)
    for one in each:
        if not callable(one):
            msg = f"on_metrics must be callable, or a sequence of callables, got {one!r}"
            raise ConfigError(msg)
    return each


class Background:
    """Runs a manager's jobs one after the other.

    Args:
        pipeline: what is done with a job.
        keeper: retention where steps are committed. At the root rank 0 applies it; in a tier only
            remains of dead writers are its business.
        rank: this rank.
        nonce: begins the attempts of this manager.
        traffic: a reading of the store's meter.
        on_metrics: told the metrics of every save when it has ended, also of a skipped one.
        lost: called with every resumable job that did not become a step.
        tiers: the local tiers, or None.
        recorder: tells the root's timeline, on rank 0; None where nobody is to.
        world: number of ranks.
    """

    def __init__(
        self,
        pipeline: SavePipeline,
        keeper: Keeper,
        *,
        rank: int,
        nonce: str,
        traffic: Callable[[], Traffic],
        on_metrics: Sequence[Reporter],
        lost: Callable[[Job], object],
        tiers: TierGroup | None = None,
        recorder: Recorder | None = None,
        world: int = 1,
    ) -> None:
        self._pipeline = pipeline
        self._keeper = keeper
        self._rank = rank
        self._nonce = nonce
        self._traffic = traffic
        self._on_metrics = on_metrics
        self._lost = lost
        self._tiers = tiers
        self._recorder = recorder
        self._world = world
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ckpt-save")
        self._running: set[Future[None]] = set()
        self._errors: list[BaseException] = []
        self._swept = False
        self._waiting: list[tuple[Job, Future[None]]] = []

    @property
    def depth(self) -> int:
        """Number of jobs that wait or run."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Hand a copied job over."""
        if self._recorder is not None:
            self._recorder.begun(open_save(job), job.epoch)
        self._waiting = [pair for pair in self._waiting if not pair[1].done()]
        self._waiting.append((job, self._submit(lambda: self._run(job))))

    def refuse(self, seq: int, error: Exception, *, echo: bool) -> None:
        """Tell the other ranks that this one sits a save out."""

        def tell() -> None:
            try:
                self._pipeline.refuse(seq, error, echo=echo)
            except SaveAborted as problem:
                # The other ranks are gone; the caller has the error that matters.
                logger.warning("could not tell the other ranks: %s", problem)

        self._submit(tell)

    def drop_last(self, arena: Arena) -> bool:
        """Take back the newest job with a slot of the arena, if its turn has not come yet.

        Its handle says that it was skipped. A rank on which it has begun learns of it in the
        vote: a step exists only if every rank wrote it.
        """
        mine = [pair for pair in self._waiting if pair[0].arena is arena]
        if not mine or not mine[-1][1].cancel():
            return False
        job = mine[-1][0]
        job.arena.release(job.slot)
        self._lost(job)
        error = SkippedSave(f"step {job.step} gave way to a newer state (when_busy='latest')")
        self.refuse(job.seq, error, echo=False)
        self._skipped(job.handle)
        self._record(job, error, [])
        return True

    def leave_out(self, handle: SaveHandle, attempt: str, *, resumable: bool) -> None:
        """Settle the handle of a save that was never begun, and report it."""
        self._skipped(handle)
        if self._recorder is not None:
            record = skipped_record(handle.metrics, attempt, self._world, resumable=resumable)
            self._recorder.ended(record)

    def _skipped(self, handle: SaveHandle) -> None:
        """Settle the handle of a save that does not take place, and report it."""
        handle.skipped = handle.metrics.skipped = True
        handle.resolve()
        self._submit(lambda: self._report(handle.metrics))

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is left to do, and raise what failed.

        Raises:
            VoteTimeout: still busy after ``timeout`` seconds.
            CkptError: the first error of the background; later ones are its notes.
        """
        _done, pending = wait(set(self._running), timeout)
        if pending:
            msg = f"{len(pending)} save(s) still under way after {timeout:g} s"
            raise VoteTimeout(msg)
        self.raise_pending()

    @contextmanager
    def errors_kept(self) -> Iterator[None]:
        """Work on although something failed before; the first call afterwards raises that."""
        earlier, self._errors = self._errors, []
        try:
            yield
        finally:
            self._errors = earlier + self._errors

    def finish(self) -> None:
        """Let everything run to its end; nothing may be submitted any more."""
        self._thread.shutdown(wait=True)
        if self._recorder is not None:
            self._recorder.close()

    def raise_pending(self) -> None:
        """Raise what failed since the last call.

        Raises:
            CkptError: the first error; later ones are its notes.
        """
        if not self._errors:
            return
        errors, self._errors = self._errors, []
        for later in errors[1:]:
            errors[0].add_note(f"then also: {later}")
        raise errors[0]

    def _submit(self, work: Callable[[], Any]) -> Future[None]:
        future = self._thread.submit(work)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def _run(self, job: Job) -> None:
        """The whole treatment of a job."""
        error: Exception | None = None
        handle, metrics = job.handle, job.handle.metrics
        before = self._traffic()

        def measure() -> None:
            moved = self._traffic() - before
            metrics.store_requests, metrics.store_bytes = moved.requests, moved.moved
            metrics.total_ms = 1e3 * (time.perf_counter() - job.started)

        job.measured = measure
        try:
            self._pipeline.run(job)
        except Exception as problem:  # noqa: BLE001 - kept, and raised by the caller's next call
            error = problem
        measure()
        committed = handle.committed
        if job.resumable and not (committed.done() and committed.exception() is None):
            self._lost(job)
        if isinstance(error, SkippedSave):
            logger.info("%s", error)
            handle.skipped = metrics.skipped = True
            handle.resolve()
        elif error is not None:
            logger.error("%s", error)
            if not isinstance(error, EchoError):
                self._errors.append(error)  # before the handle: who saw that fail finds this
            handle.refuse(error)
        removed: list[str] = []
        if error is None or isinstance(error, PublishError):
            removed = self._tidy(job)
        self._report(metrics)
        self._record(job, error, removed)

    def _record(self, job: Job, error: Exception | None, removed: Sequence[str]) -> None:
        if self._recorder is not None:
            self._recorder.ended(save_record(job, error, self._world, removed))

    def _tidy(self, job: Job) -> list[str]:
        """After a commit: retention, and once the remains of dead writers.

        Returns:
            Bare names of the steps and versions that were deleted at the root.
        """
        sweeps = self._rank == 0
        removed: list[str] = []
        if self._tiers is not None:
            sweeps = self._tiers.leads
            self._tiers.prune()
            job.handle.metrics.extra.update(self._tiers.metrics())
        elif self._rank == 0:
            if job.resumable and job.step is not None:
                self._keeper.committed(job.step, job.epoch, job.metrics)
                removed += self._keeper.prune_steps(job.epoch)
            if job.publish:
                removed += self._keeper.prune_versions()
        if sweeps and job.resumable and not self._swept:
            self._swept = True
            self._keeper.sweep(job.epoch, self._nonce)
        return removed

    def _report(self, metrics: SaveMetrics) -> None:
        for report in self._on_metrics:
            try:
                report(metrics)
            except Exception as problem:
                logger.exception("on_metrics failed")
                self._errors.append(problem)
