"""The layout of a save: cached while it holds, agreed on with the other ranks when it changes."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .arena import Arena
from .commit import Parent, claim_epoch
from .errors import CkptError, PlanError, StateError
from .fingerprint import fingerprint, joint_fingerprint, joint_mesh, mesh_json
from .job import look_topic, plan_topic, save_topic
from .plan import (
    Layout,
    Piece,
    adapter_first,
    assign,
    every_tensor,
    extra_records,
    local_pieces,
    shard_layout,
    tensor_records,
    with_copies,
)
from .restore import RestoreReport
from .storage import Storage
from .tier_group import TierGroup
from .train_state import NOTHING_TRAINS
from .types import AdapterExport, TensorRecord
from .vote import Board, RemoteFailure


@dataclass(slots=True)
class CachedLayout:
    """A layout, its arena, and the very tensors it was made from.

    Attributes:
        layout: who writes what.
        print_: fingerprint of this rank's tensors.
        arena: this rank's slots.
        names: checkpoint names, in the order of ``tensors``.
        tensors: the live tensors; while they are the same objects, so is the layout.
        stream: side stream for copies from CUDA devices, or None.
    """

    layout: Layout
    print_: str
    arena: Arena
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    stream: torch.cuda.Stream | None


class Planner:
    """Plans saves on the caller's thread, and claims the writer epoch with the first plan.

    Args:
        storage: the root.
        board: the caller thread's access to the other ranks.
        fresh: start a new run over whatever the root holds.
        tiers: the local tiers, or None.
    """

    def __init__(
        self, storage: Storage, board: Board, *, fresh: bool, tiers: TierGroup | None = None
    ) -> None:
        self._storage = storage
        self._board = board
        self._fresh = fresh
        self._tiers = tiers
        self._cache: dict[str, CachedLayout] = {}
        self._epoch: int | None = None
        self._report: RestoreReport | None = None

    def restored(self, report: RestoreReport) -> None:
        """Note a restore: what follows is a new branch with a writer epoch of its own."""
        self._report = report
        self._epoch = None

    def arena(self, *, resumable: bool) -> Arena | None:
        """The slots that a save of this kind used last, or None if there was none."""
        cached = self._cache.get(_kind(resumable=resumable))
        return None if cached is None else cached.arena

    @contextmanager
    def spare(self) -> Iterator[list[memoryview]]:
        """Memory of slots that no save uses, for the time of a restore; see :meth:`Arena.lent`."""
        arena = self.arena(resumable=True)
        if arena is None:
            yield []
            return
        with arena.lent() as memory:
            yield memory

    def release(self) -> None:
        """Give the arenas' memory back."""
        self._cache.clear()

    def layout(
        self,
        seq: int,
        step: int | None,
        tensors: dict[str, torch.Tensor],
        *,
        resumable: bool,
        parted: bool,
        export: AdapterExport | None = None,
    ) -> tuple[CachedLayout, bool, int]:
        """The cached layout, or a new one that all ranks agree on.

        Args:
            seq: number of the save.
            step: its step, or None.
            tensors: this rank's.
            resumable: whether optimizer state is among them.
            parted: whether other ranks may hold other tensors.
            export: how an adapter is made of them: the order that a new layout has them in.
        """
        kind = _kind(resumable=resumable)
        cached = self._cache.get(kind)
        print_: str | None = None
        if cached is not None and self._epoch is not None:
            same = cached.names == tuple(tensors) and all(
                map(operator.is_, cached.tensors, tensors.values())
            )
            if not same:
                print_ = fingerprint(tensors, self._board.world)
                same = print_ == cached.print_
            if parted:
                same = self._same_everywhere(seq, same=same)
            if same:
                cached.names, cached.tensors = tuple(tensors), tuple(tensors.values())
                return cached, False, self._epoch
        if print_ is None:
            print_ = fingerprint(tensors, self._board.world)
        held = adapter_first(local_pieces(tensors), export)
        layout, epoch = self._plan(seq, step, kind, tensors, print_, held, parted=parted)
        on_cuda = any(tensor.is_cuda for tensor in tensors.values())
        if cached is not None and cached.layout.mine == layout.mine:
            arena = cached.arena  # the same bytes in the same places: keep the memory
        else:
            arena = Arena(layout.shard, layout.mine, pinned=on_cuda)
        fresh = CachedLayout(
            layout,
            print_,
            arena,
            tuple(tensors),
            tuple(tensors.values()),
            torch.cuda.Stream() if on_cuda else None,  # type: ignore[no-untyped-call]  # no hints
        )
        self._cache[kind] = fresh
        self._epoch = epoch
        return fresh, True, epoch

    def _same_everywhere(self, seq: int, *, same: bool) -> bool:
        """Whether the layout is as it was on every rank; costs one round trip to the ranks' store.

        Ranks with the same names see a change all at once. A stage need not: optimizer state, for
        example, comes into being where something trains.
        """
        board, topic = self._board, look_topic(seq)
        board.answer(topic, same)
        if board.rank == 0:
            try:
                same = all(board.gather(topic, contrary=plan_topic(seq)))
            except (CkptError, RemoteFailure) as error:
                failure = board.abort(topic, error)
                board.abort(plan_topic(seq), error)
                board.abort(save_topic(seq), error)
                if isinstance(error, RemoteFailure):
                    raise failure.rebuild() from None
                raise
            board.decide(topic, same)
            return same
        verdict = board.verdict(topic)
        if verdict.failure is not None:
            raise verdict.failure.rebuild()
        return bool(verdict.value)

    def _plan(
        self,
        seq: int,
        step: int | None,
        kind: str,
        tensors: dict[str, torch.Tensor],
        print_: str,
        held: list[Piece],
        *,
        parted: bool,
    ) -> tuple[Layout, int]:
        """Agree with the other ranks about the layout, and about who writes to this root."""
        board = self._board
        topic = plan_topic(seq)
        mine_said = {"step": step, "kind": kind, "parted": parted}
        board.mark(topic)
        board.answer(
            topic,
            {
                **mine_said,
                "pieces": [piece.to_json() for piece in held],
                "fingerprint": print_,
                "mesh": mesh_json(tensors),
            },
        )
        records: tuple[TensorRecord, ...] = ()
        copies: tuple[TensorRecord, ...] = ()
        mesh: dict[str, Any] | None = None
        if board.rank == 0:
            try:
                answers = self._gather(topic, seq, mine_said)
                pieces = [[Piece.from_json(p) for p in answer["pieces"]] for answer in answers]
                assigned = assign(pieces, parted=parted)
                everything = every_tensor(pieces)
                if not everything:
                    raise StateError(NOTHING_TRAINS)
                stored = assigned
                if self._tiers is not None and kind == "step":
                    stored = with_copies(pieces, assigned, self._tiers.groups)
                records = tensor_records(everything, assigned, stored)
                copies = extra_records(everything, assigned, stored)
                joint = joint_fingerprint([answer["fingerprint"] for answer in answers])
                mesh = joint_mesh([answer["mesh"] for answer in answers])
                epoch = self._claim()
            except (CkptError, RemoteFailure) as error:
                failure = board.abort(topic, error)
                board.abort(look_topic(seq), error)
                board.abort(save_topic(seq), error)
                if isinstance(error, RemoteFailure):
                    raise failure.rebuild() from None
                raise
            names = [[piece.name for piece in mine] for mine in stored]
            decision: dict[str, Any] = {"epoch": epoch, "assigned": names}
            # Otherwise each rank goes by its own, so that a difference shows in the vote.
            decision["fingerprint"] = joint if parted else None
            board.decide(topic, decision)
        else:
            verdict = board.verdict(topic)
            if verdict.failure is not None:
                raise verdict.failure.rebuild()
            decision = verdict.value
        if self._tiers is not None and decision["epoch"] != self._epoch:
            self._tiers.claimed(decision["epoch"])
        wanted = set(decision["assigned"][board.rank])
        mine = tuple(piece for piece in held if piece.name in wanted)
        layout = Layout(
            fingerprint=decision["fingerprint"] or print_,
            held=tuple(held),
            mine=mine,
            shard=shard_layout(mine),
            writers=tuple(r for r, names in enumerate(decision["assigned"]) if names),
            records=records,
            mesh=mesh,
            copies=copies,
            parted=parted,
        )
        return layout, decision["epoch"]

    def _gather(self, topic: str, seq: int, said: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Rank 0: what every rank holds, if all of them plan the same save."""
        answers = self._board.gather(topic, contrary=save_topic(seq))
        for rank, answer in enumerate(answers):
            for what, mine in said.items():
                if answer[what] != mine:
                    msg = (
                        f"ranks disagree about what is saved: {what} is {mine} on rank 0 and "
                        f"{answer[what]} on rank {rank}"
                    )
                    raise PlanError(msg)
        return answers

    def _claim(self) -> int:
        """Rank 0: become the root's writer, once for each branch of the run."""
        if self._epoch is not None:
            return self._epoch
        report = self._report
        if self._tiers is not None:
            self._tiers.check_restored(restored=report is not None, fresh=self._fresh)
        parent = None
        if report is not None and report.step is not None and report.epoch is not None:
            parent = Parent(report.epoch, report.step)
        seen = None if report is None else report.seen_epoch
        return claim_epoch(self._storage, parent, seen=seen, fresh=self._fresh).epoch


def _kind(*, resumable: bool) -> str:
    return "step" if resumable else "version"
