"""CheckpointManager: the trainer's one object for saving, publishing and resuming."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Self, get_args

import torch
import torch.distributed as dist

from .arena import local_tensor
from .background import Background
from .busy import BusyRule, WhenBusy
from .catalog import list_steps
from .errors import CkptError, ConfigError, StepExists
from .handle import SaveHandle
from .job import Job, encode_values
from .layout import check_run_name, check_step
from .manifest import check_metrics
from .planner import Planner
from .rendezvous import join
from .restore import RestoreReport, restore
from .retain import Keeper
from .save import EchoError, SavePipeline
from .storage import Storage, open_storage
from .train_state import TrainState
from .types import MODEL_PREFIX, Retention, SaveMetrics
from .vote import Board

logger = logging.getLogger(__name__)

DEFAULT_RUN = "run"
FAREWELL_SECONDS = 30.0
RESTORE_PATIENCE = 4
"""Restores read everything before they vote: they get this many times the vote's deadline."""


class CheckpointManager:
    """Saves a :class:`TrainState` in the background and restores it.

    Every rank of the group makes one, with the same arguments, and makes the same calls in the
    same order. Only the construction uses a collective (on a gloo group of its own). ``save()``
    copies the tensors and returns; the first save and one whose layout changed also plan, which
    talks to the other ranks. What fails in the background is raised by the next ``save()``,
    ``publish()``, ``restore()``, ``wait()`` or ``close()``, and by the handle's futures.

    Args:
        root: directory or URL of one run.
        retention: what to keep.
        storage_options: for fsspec (never stored or logged).
        process_group: the ranks that save together; the default group if None.
        run_name: first part of published versions' names (default ``"run"``).
        fresh: start a new run over whatever the root holds.
        publish_dtype: dtype of published adapters.
        vote_timeout: seconds that rank 0 waits for a rank's answer after its own is in.
        on_metrics: called on the background thread when a save has ended, well or not or
            skipped, with its metrics. What it raises surfaces like any background error.
        when_busy: what ``save()`` and ``publish()`` do while both arena slots are in use:
            ``"block"`` waits for one, ``"skip"`` leaves the new save out, ``"latest"`` gives up
            the newest save that still waits its turn, with what it was to publish. Ranks agree
            first, which costs one round trip to the ranks' store, except for ``"block"``. A save
            that is left out or given up has a handle that says ``skipped``.

    Raises:
        ConfigError: an argument that cannot work.
        StorageError: the store cannot be reached.
        SaveAborted: the ranks could not meet.
    """

    def __init__(
        self,
        root: str | PathLike[str],
        *,
        retention: Retention | None = None,
        storage_options: Mapping[str, Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        run_name: str | None = None,
        fresh: bool = False,
        publish_dtype: str = "bfloat16",
        vote_timeout: float = 300.0,
        on_metrics: Callable[[SaveMetrics], object] | None = None,
        when_busy: WhenBusy = "block",
    ) -> None:
        if when_busy not in get_args(WhenBusy):
            wanted = ", ".join(map(repr, get_args(WhenBusy)))
            msg = f"when_busy must be one of {wanted}, got {when_busy!r}"
            raise ConfigError(msg)
        if not vote_timeout > 0:
            msg = f"vote_timeout must be a positive number of seconds, got {vote_timeout!r}"
            raise ConfigError(msg)
        name = check_run_name(DEFAULT_RUN if run_name is None else run_name)
        self._storage: Storage = open_storage(root, storage_options)
        self._ranks = join(process_group, vote_timeout)
        rank, world = self._ranks.rank, self._ranks.world
        self._board = Board(self._ranks.stores[0], rank, world, vote_timeout)
        self._restore_board = Board(
            self._ranks.stores[0], rank, world, RESTORE_PATIENCE * vote_timeout
        )
        self._background = Board(self._ranks.stores[1], rank, world, vote_timeout)
        self._pipeline = SavePipeline(
            self._storage, self._background, run_name=name, publish_dtype=publish_dtype
        )
        self._planner = Planner(self._storage, self._board, fresh=fresh)
        self._work = Background(
            self._pipeline,
            Keeper(self._storage, retention or Retention(), name),
            rank=rank,
            nonce=self._ranks.nonce,
            traffic=lambda: self._storage.traffic,
            on_metrics=on_metrics,
            lost=lambda job: self._taken.discard(job.step or 0),
        )
        self._busy = BusyRule(self._board, when_busy)
        self._vote_timeout = vote_timeout
        self._taken: set[int] = set()
        self._seq = 0
        self._restores = 0
        self._report: RestoreReport | None = None
        self._closed = False

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the last :meth:`restore` did: damaged steps, differences, notes."""
        return self._report

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        publish: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle:
        """Copy the state and commit it as a step in the background.

        Args:
            step: the step number; every step is saved at most once by a writer.
            state: what to save; unchanged tensors objects make this as cheap as a copy.
            publish: also publish the adapter, as a new version.
            metrics: finite numbers that go into the step's manifest, such as the reward, for
                ``Retention(best=..., metric=...)`` and for people. Those of rank 0 count.

        Returns:
            The save's futures and metrics.

        Raises:
            ConfigError: a step number or metric that is none.
            UnrestoredRoot: first save into a root with steps that were not restored.
            StepExists: this writer saved the step already.
            PlanError: ranks disagree about what is saved.
            CkptError: the error of an earlier background save; this save did not take place.
        """
        check_step(step)
        values = check_metrics(metrics or {})
        return self._start(step, state, resumable=True, publish=publish, values=values)

    def publish(self, state: TrainState, *, step: int | None = None) -> SaveHandle:
        """Publish the adapter as a new version, without a resumable step.

        Args:
            state: whose adapter; the optimizer is not looked at.
            step: the training step to record, or None.

        Returns:
            The publish's futures and metrics; ``committed`` is None at once.

        Raises:
            CkptError: as for :meth:`save`.
        """
        if step is not None:
            check_step(step)
        return self._start(step, state, resumable=False, publish=True)

    def restore(
        self, state: TrainState, *, step: int | None = None, strict: bool = True
    ) -> int | None:
        """Bring the newest valid step into the live state, in place.

        Saves under way are finished first. Damaged steps are passed over, with a warning, and
        listed in :attr:`last_restore`. On another number of ranks the tensors are resharded;
        random number generators are seeded anew from the saved ones, and rank ``r`` takes the
        data position and ``per_rank`` state of rank ``r % old``.

        Args:
            state: the live state; its optimizer needs no step before.
            step: a step number, or None for the newest.
            strict: refuse a difference in names; otherwise what fits is restored.

        Returns:
            The restored step, or None if the root holds none.

        Raises:
            NoCheckpoint, DamagedError, StateError, BaseMismatch, StorageError, SaveAborted: see
                :func:`ckpt.restore.restore`; nothing live was changed.
        """
        self._require_open()
        self.wait()
        self._restores += 1
        topic = f"restore/{self._restores}"
        report = restore(self._storage, self._restore_board, topic, state, step=step, strict=strict)
        self._report = report
        self._planner.restored(report)
        self._taken.clear()
        return report.step

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is in the background, and raise what failed there.

        Raises:
            VoteTimeout: still busy after ``timeout`` seconds.
            CkptError: the first error of the background; later ones are its notes.
        """
        self._work.wait(timeout)

    def close(self) -> None:
        """Finish what is under way, leave the other ranks, and raise what failed.

        Raises:
            CkptError: the first error of the background.
        """
        if self._closed:
            return
        self._closed = True
        self._work.finish()
        self._board.farewell(min(self._vote_timeout, FAREWELL_SECONDS))
        self._ranks.release()
        self._planner.release()
        self._work.raise_pending()

    def steps(self) -> list[int]:
        """Numbers of the steps that a restore may choose from, oldest first (reads storage)."""
        entries = list_steps(self._storage)
        return sorted({entry.step for entry in entries if entry.state == "committed"})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close; an error of the background does not hide one that is on its way already."""
        try:
            self.close()
        except CkptError as problem:
            if error is None:
                raise
            error.add_note(f"the checkpoint manager also failed: {problem}")

    def _start(
        self,
        step: int | None,
        state: TrainState,
        *,
        resumable: bool,
        publish: bool,
        values: Mapping[str, float] | None = None,
    ) -> SaveHandle:
        """The caller's half of a save: plan if need be, copy, hand over."""
        self._require_open()
        started = time.perf_counter()
        seq = self._seq
        self._seq += 1
        try:
            self._work.raise_pending()
        except Exception as error:
            # Every rank knows this error; the others must not wait for this save.
            self._busy.refuse(seq, error)
            self._work.refuse(seq, error, echo=True)
            raise
        try:
            left_out = self._give_way(seq, step, resumable=resumable)
            if left_out is not None:
                return left_out
            job = self._stage(seq, step, state, resumable, publish, started)
            job.metrics = values or {}
        except Exception as error:
            self._work.refuse(seq, error, echo=False)
            raise
        self._work.submit(job)
        return job.handle

    def _give_way(self, seq: int, step: int | None, *, resumable: bool) -> SaveHandle | None:
        """Apply ``when_busy``; the handle of this save if it is not to take place."""
        arena = self._planner.arena(resumable=resumable)
        left_out = SaveHandle(step, SaveMetrics(step=step, queue_depth=self._work.depth))
        try:
            choice = self._busy.choose(seq, free=arena is None or arena.available())
        except EchoError as error:
            left_out.refuse(error)  # its cause is raised by this rank's next call
            return left_out
        if choice == "skip":
            self._work.skipped(left_out)
            return left_out
        if choice == "drop" and arena is not None:
            self._work.drop_last(arena)
        return None

    def _stage(
        self,
        seq: int,
        step: int | None,
        state: TrainState,
        resumable: bool,
        publish: bool,
        started: float,
    ) -> Job:
        if resumable and step in self._taken:
            msg = f"step {step} was saved already by this writer; committed steps are immutable"
            raise StepExists(msg)
        export = state.export()
        if publish and export is None:
            msg = (
                "publishing needs to know how the PEFT adapter is made: use apply_lora(), whose "
                "models bring it along, or TrainState(export=...)"
            )
            raise ConfigError(msg)
        live = state.live()
        tensors = live.tensors
        if not resumable:
            tensors = {n: t for n, t in tensors.items() if n.startswith(MODEL_PREFIX)}
        cached, planned, epoch = self._planner.layout(seq, step, tensors, resumable=resumable)
        shared, mine = encode_values(state, live, resumable=resumable)
        slot = cached.arena.acquire(2 * RESTORE_PATIENCE * self._vote_timeout)
        try:
            if slot is not None:
                with torch.no_grad():
                    sources = [local_tensor(tensors[p.name]) for p in cached.layout.mine]
                    slot.fill(sources, cached.stream)
                    slot.order_after_copy()
        except BaseException:
            cached.arena.release(slot)
            raise
        nbytes = 0 if slot is None else slot.nbytes
        metrics = SaveMetrics(step=step, stage_bytes=nbytes, planned=planned)
        metrics.queue_depth = self._work.depth
        handle = SaveHandle(step, metrics)
        if cached.stream is None:
            handle.staged.set_result(None)
        if resumable and step is not None:
            self._taken.add(step)
        metrics.stall_ms = 1e3 * (time.perf_counter() - started)
        return Job(
            seq=seq,
            step=step,
            resumable=resumable,
            publish=publish,
            planned=planned,
            attempt=f"{self._ranks.nonce}{seq:08d}",
            epoch=epoch,
            layout=cached.layout,
            arena=cached.arena,
            slot=slot,
            shared=shared,
            mine=mine,
            export=export,
            base=state.base,
            policy_version=state.policy_version,
            handle=handle,
            started=started,
        )

    def _require_open(self) -> None:
        if self._closed:
            msg = "this CheckpointManager is closed"
            raise ConfigError(msg)
