"""The half of :class:`~ckpt.manager.CheckpointManager` that reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from os import PathLike
from typing import Any

from .adapter_fit import KeyMap
from .planner import Planner
from .restore import RestoreReport, restore
from .staging import Staging
from .storage import Storage
from .takeover import Source, WarmStart, take_over
from .tier_group import TierGroup
from .train_state import TrainState
from .types import AdapterExport
from .vote import Board

RESTORE_PATIENCE = 4
"""Restores read everything before they vote: they get this many times the vote's deadline."""


class Restoring(ABC):
    """Brings values into a live state, between saves.

    Args:
        root: the run's root.
        board: the caller thread's access to the other ranks, with a long deadline.
        planner: hears where a run goes on.
        staging: forgets which steps were saved before that.
        tiers: the local tiers, or None.
    """

    def __init__(
        self,
        root: Storage,
        board: Board,
        planner: Planner,
        staging: Staging,
        tiers: TierGroup | None,
    ) -> None:
        self._root = root
        self._patient = board
        self._plans = planner
        self._saves = staging
        self._sources = tiers
        self._restores = 0
        self._report: RestoreReport | None = None

    @property
    def last_restore(self) -> RestoreReport | None:
        """What the last :meth:`restore` did: damaged steps, differences, notes."""
        return self._report

    def restore(
        self,
        state: TrainState,
        *,
        step: int | None = None,
        strict: bool = True,
        parts: Collection[str] | None = None,
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
            parts: the names of the parts to restore (:class:`~ckpt.state_parts.Part`), e.g.
                ``{"model"}`` or ``ALL_PARTS - {"optimizer"}``; the others stay as they are, and
                the bytes of theirs are not read. None restores everything.

        Returns:
            The restored step, or None if the root holds none.

        Raises:
            ConfigError, PlanError, NoCheckpoint, DamagedError, StateError, BaseMismatch,
                StorageError, SaveAborted: see :func:`ckpt.restore.restore`; nothing live was
                changed.
        """
        self._require_open()
        self.wait()
        self._restores += 1
        with self._plans.spare() as spare:
            report = restore(
                self._root,
                self._patient,
                f"restore/{self._restores}",
                state,
                step=step,
                strict=strict,
                parts=parts,
                tier=None if self._sources is None else self._sources.tier,
                spare=spare,
            )
        self._report = report
        self._plans.restored(report)
        self._saves.taken.clear()
        return report.step

    def warm_start(
        self,
        state: TrainState,
        url: str | PathLike[str],
        *,
        export: AdapterExport | Mapping[str, Any] | None = None,
        keymap: KeyMap | None = None,
        rescale: bool = False,
        any_base: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> WarmStart:
        """Begin a run with the values of a PEFT adapter; every rank calls this.

        For a root without steps: :meth:`restore` said None. Afterwards the model computes what the
        adapter's own model computed; nothing but the model's trainable tensors is changed.

        Args:
            state: the live state, with an optimizer that has made no step.
            url: a PEFT directory, or a published version's: a path, or a URL of any store.
            export: how the live state becomes a PEFT adapter, if not as its model says.
            keymap: renames the directory's keys before they are compared.
            rescale: fold a scaling (``alpha / r``) that is not the live one into B.
            any_base: do not compare the base models.
            storage_options: for the directory's store (never stored or logged).

        Returns:
            What was taken.

        Raises:
            CkptError: see :func:`ckpt.takeover.take_over`; nothing live was changed.
        """
        self._require_open()
        self.wait()
        self._restores += 1
        source = Source(url, export, keymap, rescale, any_base, storage_options)
        return take_over(self._patient, f"warm/{self._restores}", state, source)

    @abstractmethod
    def wait(self, timeout: float | None = None) -> None:
        """Block until nothing is in the background, and raise what failed there."""

    @abstractmethod
    def _require_open(self) -> None: ...
