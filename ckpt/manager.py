"""CheckpointManager: the trainer's one object for saving, publishing and resuming."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Mapping
from os import PathLike
from types import TracebackType
from typing import Any, Self, get_args

import torch.distributed as dist

from .background import Background, Reporters, reporters
from .busy import BusyRule, WhenBusy
from .catalog import list_steps
from .errors import CkptError, ConfigError, VoteTimeout
from .handle import SaveHandle
from .layout import check_run_name, check_step
from .manifest import check_metrics
from .planner import Planner
from .preempt import DEADLINE_S, Preemption
from .publish import check_probe
from .recorder import Recorder
from .rendezvous import join
from .restoring import RESTORE_PATIENCE, Restoring
from .retain import Keeper
from .save import SavePipeline
from .staging import Staging
from .storage import Storage, open_storage
from .tier_group import join_tiers
from .train_state import TrainState
from .types import Retention
from .vote import Board

logger = logging.getLogger(__name__)

DEFAULT_RUN = "run"
FAREWELL_SECONDS = 30.0


class CheckpointManager(Restoring):
    """Saves a :class:`TrainState` in the background and restores it.

    Every rank of the group makes one, with the same arguments, and makes the same calls in the
    same order. Only the construction uses a collective (on a gloo group of its own). ``save()``
    copies the tensors and returns; the first save and one whose layout changed also plan, which
    talks to the other ranks. What fails in the background is raised by the next ``save()``,
    ``publish()``, ``restore()``, ``wait()`` or ``close()``, and by the handle's futures.

    Args:
        root: directory or URL of one run.
        retention: what to keep.
        local_tier: a local directory (disk or ``/dev/shm``; a path or ``file://`` URL) in which
            steps commit; a process of its own mirrors them to ``root``. Ranks of one node share
            one; nodes may have one each.
        storage_options: for fsspec (never stored or logged).
        process_group: the ranks that save together; the default group if None.
        run_name: first part of published versions' names (default ``"run"``).
        fresh: start a new run over whatever the root holds.
        publish_dtype: dtype of published adapters.
        vote_timeout: seconds that rank 0 waits for a rank's answer after its own is in.
        on_metrics: called on the background thread when a save has ended, well or not or
            skipped, with its metrics; one callable or several. What one raises surfaces like any
            background error.
        timeline: tell the root what saves cost, in small records for people (``metrics/``).
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
        local_tier: str | PathLike[str] | None = None,
        retention: Retention | None = None,
        storage_options: Mapping[str, Any] | None = None,
        process_group: dist.ProcessGroup | None = None,
        run_name: str | None = None,
        fresh: bool = False,
        publish_dtype: str = "bfloat16",
        vote_timeout: float = 300.0,
        on_metrics: Reporters = None,
        when_busy: WhenBusy = "block",
        timeline: bool = True,
    ) -> None:
        if when_busy not in get_args(WhenBusy):
            wanted = ", ".join(map(repr, get_args(WhenBusy)))
            msg = f"when_busy must be one of {wanted}, got {when_busy!r}"
            raise ConfigError(msg)
        if not vote_timeout > 0:
            msg = f"vote_timeout must be a positive number of seconds, got {vote_timeout!r}"
            raise ConfigError(msg)
        name = check_run_name(DEFAULT_RUN if run_name is None else run_name)
        keep = retention or Retention()
        self._root: Storage = open_storage(root, storage_options)
        self._ranks = join(process_group, vote_timeout)
        rank, world = self._ranks.rank, self._ranks.world
        self._board = Board(self._ranks.stores[0], rank, world, vote_timeout)
        self._background = Board(self._ranks.stores[1], rank, world, vote_timeout)
        tiers = self._tiers = join_tiers(local_tier, root, self._root, self._board, keep)
        storage = self._storage = self._root if tiers is None else tiers.storage
        self._pipeline = SavePipeline(
            storage, self._background, run_name=name, publish_dtype=publish_dtype, tiers=tiers
        )
        self._planner = Planner(self._root, self._board, fresh=fresh, tiers=tiers)
        self._work = Background(
            self._pipeline,
            Keeper(storage, keep, name),
            rank=rank,
            nonce=self._ranks.nonce,
            traffic=lambda: storage.traffic,
            on_metrics=reporters(on_metrics),
            lost=lambda job: self._staging.taken.discard(job.step or 0),
            tiers=tiers,
            recorder=Recorder(lambda: open_storage(root, storage_options), "trainer")
            if timeline and rank == 0
            else None,
            world=world,
        )
        self._staging = Staging(
            self._planner,
            self._work,
            BusyRule(self._board, when_busy),
            nonce=self._ranks.nonce,
            patience=2 * RESTORE_PATIENCE * vote_timeout,
        )
        self._preemption = Preemption(self._board)
        self._vote_timeout = vote_timeout
        self._closed = False
        patient = Board(self._ranks.stores[0], rank, world, RESTORE_PATIENCE * vote_timeout)
        super().__init__(self._root, patient, self._planner, self._staging, tiers)
        if tiers is not None:
            tiers.start(root, self._ranks.nonce, name, storage_options)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        publish: bool = False,
        metrics: Mapping[str, float] | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> SaveHandle:
        """Copy the state and commit it as a step in the background.

        Args:
            step: the step number; every step is saved at most once by a writer.
            state: what to save; unchanged tensors objects make this as cheap as a copy.
            publish: also publish the adapter, as a new version.
            metrics: finite numbers that go into the step's manifest, such as the reward, for
                ``Retention(best=..., metric=...)`` and for people. Those of rank 0 count.
            probe: outputs that an engine shows once it has loaded the version; they go into its
                manifest. Those of rank 0 count.

        Returns:
            The save's futures and metrics.

        Raises:
            ConfigError: a step number, metric or probe that is none, or a probe of no version.
            UnrestoredRoot: first save into a root with steps that were not restored.
            StepExists: this writer saved the step already.
            PlanError: ranks disagree about what is saved.
            CkptError: the error of an earlier background save; this save did not take place.
        """
        check_step(step)
        values = check_metrics(metrics or {})
        shown = check_probe(probe, publish=publish)
        self._require_open()
        return self._staging.start(
            step, state, resumable=True, publish=publish, values=values, probe=shown
        )

    def publish(
        self,
        state: TrainState,
        *,
        step: int | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> SaveHandle:
        """Publish the adapter as a new version, without a resumable step.

        Args:
            state: whose adapter; the optimizer is not looked at.
            step: the training step to record, or None.
            probe: as for :meth:`save`.

        Returns:
            The publish's futures and metrics; ``committed`` is None at once.

        Raises:
            CkptError: as for :meth:`save`.
        """
        if step is not None:
            check_step(step)
        shown = check_probe(probe, publish=True)
        self._require_open()
        return self._staging.start(step, state, resumable=False, publish=True, probe=shown)

    def save_on_signal(
        self, *signals: signal.Signals, deadline: float = DEADLINE_S
    ) -> Callable[[], None]:
        """Have signals ask for one last save; they no longer end the process by themselves.

        A handler only notes the moment. The loop asks :meth:`preempted` after every step, on
        every rank, and calls :meth:`last_save`.

        Args:
            signals: which ones; SIGTERM by default.
            deadline: seconds from the signal by which the last save must have been committed.

        Returns:
            Puts the handlers back that were there before; :meth:`close` does so too.

        Raises:
            ConfigError: not on the main thread, a signal that cannot be handled, or a deadline
                that is not positive.
        """
        self._preemption.install(signals or (signal.SIGTERM,), deadline)
        return self._preemption.release

    def request_stop(self) -> None:
        """Ask for the last save from code, e.g. when a host's notice is polled; any thread."""
        self._preemption.request()

    def preempted(self) -> bool:
        """Whether any rank was asked to stop; the same answer on all ranks.

        Every rank asks at the same point of its loop. Costs one round trip to the ranks' store,
        and waits there for the slowest rank; on a single rank it costs nothing.

        Raises:
            SaveAborted: a rank is gone or did not ask in time.
        """
        self._require_open()
        return self._preemption.agreed()

    def last_save(
        self,
        step: int,
        state: TrainState,
        *,
        publish: bool = False,
        metrics: Mapping[str, float] | None = None,
    ) -> SaveHandle | None:
        """Save once more and wait until it is committed, within the deadline; on every rank.

        An error of an earlier save does not stand in the way; the next call raises it. Neither
        does ``when_busy``. A step that is saved already is waited for.

        Returns:
            The handle, or None if the step had been saved before.

        Raises:
            VoteTimeout: not committed when the deadline was reached. It may still be, but
                :meth:`close` would wait for it: leave the process instead.
            CkptError: the save failed.
        """
        check_step(step)
        values = check_metrics(metrics or {})
        self._require_open()
        with self._work.errors_kept():
            if step in self._staging.taken:
                self._work.wait(self._preemption.left())
                return None
            patience = self._preemption.left()
            handle = self._staging.start(
                step, state, resumable=True, publish=publish, values=values, patience=patience
            )
            try:
                handle.wait(self._preemption.left())
            except TimeoutError as error:
                if isinstance(error, CkptError):
                    raise
                msg = f"the last save, step {step}, was not committed before the deadline"
                raise VoteTimeout(msg) from error
        return handle

    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is in the background, and raise what failed there.

        Raises:
            VoteTimeout: still busy after ``timeout`` seconds.
            CkptError: the first error of the background; later ones are its notes.
        """
        self._work.wait(timeout)

    def wait_mirrored(self, timeout: float | None = None) -> None:
        """With a local tier: block until all that it holds is at the root, too.

        Raises:
            VoteTimeout: not within ``timeout`` seconds; says what is left and why.
            DamagedError: something in the tier does not verify and was not mirrored.
            CkptError: as for :meth:`wait`, which comes first.
        """
        self.wait(timeout)
        if self._tiers is not None:
            self._tiers.wait_mirrored(timeout)

    def close(self) -> None:
        """Finish what is under way, leave the other ranks, and raise what failed.

        With a local tier, the uploader goes on by itself until everything is at the root.

        Raises:
            CkptError: the first error of the background.
        """
        if self._closed:
            return
        self._closed = True
        self._preemption.release()
        self._work.finish()
        if self._tiers is not None:
            self._tiers.close()
        self._board.farewell(min(self._vote_timeout, FAREWELL_SECONDS))
        self._ranks.release()
        self._planner.release()
        self._work.raise_pending()

    def steps(self) -> list[int]:
        """Numbers of the steps that a restore may choose from, oldest first (reads storage)."""
        entries = list_steps(self._root)
        found = {entry.step for entry in entries if entry.state == "committed"}
        return sorted(found if self._tiers is None else found | self._tiers.steps())

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

    def _require_open(self) -> None:
        if self._closed:
            msg = "this CheckpointManager is closed"
            raise ConfigError(msg)
