"""Restore: verify first, touch live tensors last, one decision for all ranks.

Rank 0 proposes steps of the lineage, newest first. Every rank checks the proposal against its
live state and fetches its bytes; only if all of them verified does any rank change anything. A
damaged step is reported and the next older one is proposed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .arena import local_tensor
from .asked import Asked, ask, compare
from .catalog import check_sizes, read_lineage, step_dirs
from .commit import newest_epoch
from .errors import (
    CkptError,
    DamagedError,
    NoCheckpoint,
    ObjectNotFound,
    StateError,
    StorageError,
)
from .fetch import fetch
from .layout import MANIFEST, step_dir
from .manifest import StepManifest
from .match import Staged, check_base, check_union, match, read_state
from .plan import local_pieces
from .state_parts import ALL_PARTS, Part
from .storage import Storage
from .tier import Tier
from .train_state import TrainState
from .vote import Board, RemoteFailure

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DamagedStep:
    """A step that was passed over, and why."""

    step: int
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What a restore did.

    Attributes:
        step: the restored step, or None for an empty root.
        epoch: the writer epoch it belongs to, or None.
        seen_epoch: the newest writer epoch at that moment; known on rank 0 only.
        damaged: newer steps, and copies in the local tier, that did not verify.
        missing: live names (or sections) that the checkpoint lacks (``strict=False`` only).
        extra: names of the checkpoint that are not live (``strict=False`` only).
        notes: what could not carry over exactly.
        local: whether it was read from the local tier.
        parts: the parts that were asked for; the others are as they were.
    """

    step: int | None
    epoch: int | None
    seen_epoch: int
    damaged: tuple[DamagedStep, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    local: bool = False
    parts: frozenset[Part] = ALL_PARTS


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A step to try, and whether in the local tiers or at the root."""

    step: int
    epoch: int
    local: bool

    @property
    def pair(self) -> tuple[int, int]:
        return self.step, self.epoch


def restore(
    storage: Storage,
    board: Board,
    topic: str,
    state: TrainState,
    *,
    step: int | None,
    strict: bool,
    parts: Collection[str] | None = None,
    tier: Tier | None = None,
    spare: Sequence[memoryview] = (),
) -> RestoreReport:
    """Bring the newest valid step (or the one asked for) into the live state.

    The copy in the local tiers is taken if every rank can verify what it needs of it there,
    otherwise the one at the root; which it is, is decided once for all ranks.

    Args:
        storage: the root.
        board: access to the other ranks; all of them call this.
        topic: a topic that no other exchange has.
        state: the live state.
        step: a step number, or None for the newest that verifies.
        strict: refuse a difference in names between the checkpoint and the live state.
        parts: the names of the parts to restore (:class:`~ckpt.state_parts.Part`); None for all.
            The others are neither compared nor changed, and their bytes are not read.
        tier: this rank's local tier, or None on all ranks.
        spare: memory to stage in; its content is lost, and nothing refers to it afterwards.

    Raises:
        ConfigError: a step or parts that cannot be, or rank 0's tier holds steps of another run.
        PlanError: ranks ask for different things.
        NoCheckpoint: no such step, or none of the root's steps is whole.
        DamagedError: the step asked for does not verify.
        StateError: names, shapes or dtypes differ, and nothing was changed; or a live object
            refused its saved value, which the message says.
        BaseMismatch: the adapter was trained over another base model.
        StorageError: the store failed.
        SaveAborted: another rank failed; nothing was changed.
    """
    asked = ask(board, topic, step, strict=strict, parts=parts, parted=state.parted)
    seen = 0
    candidates: list[_Candidate] = []
    if board.rank == 0:
        try:
            compare(board, topic)
            seen = newest_epoch(storage)
            candidates = _candidates(storage, step, tier)
        except RemoteFailure as error:
            raise board.abort(f"{topic}/0/proposal", error).rebuild(keep=True) from error
        except CkptError as error:
            board.abort(f"{topic}/0/proposal", error)
            raise
    damaged: list[DamagedStep] = []
    for number in _count():
        here = f"{topic}/{number}"
        proposed = candidates[number : number + 1]
        found = _propose(board, here, proposed, damaged, asked=step is not None)
        if found is None:
            return RestoreReport(None, None, seen, tuple(damaged), parts=asked.parts)
        staged = _agree(storage, tier, board, here, state, found, damaged, asked, spare)
        if staged is not None:
            notes = _apply(state, staged, board, asked.parts)
            return RestoreReport(
                *found.pair,
                seen,
                tuple(damaged),
                staged.missing,
                staged.extra,
                tuple(notes),
                found.local,
                asked.parts,
            )
    raise AssertionError  # the loop above only ends by return or raise


def _count() -> Iterable[int]:
    number = 0
    while True:
        yield number
        number += 1


def _candidates(storage: Storage, step: int | None, tier: Tier | None) -> list[_Candidate]:
    """What to try, best first: by lineage, and of each step the local copy before the root's.

    Raises:
        ConfigError: the tier holds steps of another run.
        NoCheckpoint: there is no such step.
    """
    items = [] if tier is None else tier.check_run(storage)
    here = {item.pair for item in items if item.pair is not None}
    there = set(step_dirs(storage))
    known = here | there
    lineage = read_lineage(storage, known).steps
    if not storage.has_rename:
        # An object store shows unfinished attempts too; without a manifest they are no steps.
        there = {p for p in lineage if p in there and storage.exists(f"{step_dir(*p)}/{MANIFEST}")}
    lineage = [pair for pair in lineage if pair in here or pair in there]
    wanted = lineage
    if step is not None:
        wanted = [pair for pair in lineage if pair[0] == step][:1]
        if not wanted:
            raise NoCheckpoint(_no_such_step(storage, step, lineage, known))
    return [
        _Candidate(*pair, local)
        for pair in wanted
        for local, place in ((True, here), (False, there))
        if pair in place
    ]


def _no_such_step(
    storage: Storage,
    step: int,
    lineage: Sequence[tuple[int, int]],
    found: Iterable[tuple[int, int]],
) -> str:
    have = ", ".join(str(pair[0]) for pair in lineage[:8]) or "none"
    hint = ""
    if any(pair[0] == step for pair in found):
        hint = "; it was abandoned when a later writer resumed from before it"
    return f"no step {step} in {storage.url}{hint}; newest steps: {have}"


def _propose(
    board: Board,
    topic: str,
    candidate: list[_Candidate],
    damaged: list[DamagedStep],
    *,
    asked: bool,
) -> _Candidate | None:
    """Rank 0 names the next step to try; all ranks learn it. None: the root is empty."""
    if board.rank == 0:
        if not candidate and damaged:
            reasons = "; ".join(entry.reason for entry in damaged)
            error: CkptError = NoCheckpoint(
                f"none of the {len(damaged)} step(s) verifies: {reasons}"
            )
            if asked:
                error = DamagedError(reasons)
            board.abort(f"{topic}/proposal", error)
            raise error
        value = asdict(candidate[0]) if candidate else None
        board.decide(f"{topic}/proposal", value)
    else:
        verdict = board.verdict(f"{topic}/proposal")
        if verdict.failure is not None:
            raise verdict.failure.rebuild(keep=True)
        value = verdict.value
    return None if value is None else _Candidate(**value)


def _agree(
    storage: Storage,
    tier: Tier | None,
    board: Board,
    topic: str,
    state: TrainState,
    found: _Candidate,
    damaged: list[DamagedStep],
    asked: Asked,
    spare: Sequence[memoryview],
) -> Staged | None:
    """Stage a step on every rank; None (on every rank) if any found it damaged."""
    staged: Staged | None = None
    own: CkptError | None = None
    try:
        staged, digest = _stage(storage, tier, state, found, board, asked, spare)
        board.answer(f"{topic}/check", {"digest": digest, "elsewhere": staged.elsewhere})
    except DamagedError as error:
        board.answer(f"{topic}/check", {"damaged": str(error)})
    except CkptError as error:
        own = error
        board.fail(f"{topic}/check", error)
    if board.rank == 0:
        try:
            answers = board.gather(f"{topic}/check")
            value: dict[str, Any] = {"damaged": _tally(answers), "extra": []}
            if value["damaged"] is None:
                lacking = [answer["elsewhere"] for answer in answers]
                value["extra"] = check_union(found.step, lacking, strict=asked.strict)
            board.decide(f"{topic}/apply", value)
        except (CkptError, RemoteFailure) as error:
            failure = board.abort(f"{topic}/apply", error)
            raise (own or failure.rebuild(keep=True)) from error
    else:
        verdict = board.verdict(f"{topic}/apply")
        if verdict.failure is not None:
            raise own or verdict.failure.rebuild(keep=True)
        value = verdict.value
    if value["damaged"] is None and staged is not None:
        staged.extra += tuple(value["extra"])
        return staged
    why = value["damaged"]
    reason = f"step {found.step} (writer {found.epoch}) of {storage.url} is damaged: {why}"
    if found.local:
        reason = f"step {found.step} (writer {found.epoch}) is not whole in the local tier: {why}"
    logger.warning("%s; it is passed over", reason)
    damaged.append(DamagedStep(*found.pair, reason))
    return None


def _tally(answers: Sequence[Mapping[str, Any]]) -> str | None:
    """Why the step may not be used, or None; equal manifests on all ranks are part of that."""
    for rank, answer in enumerate(answers):
        if "damaged" in answer:
            return f"{answer['damaged']} (seen by rank {rank})"
        if answer["digest"] != answers[0].get("digest"):
            return f"ranks 0 and {rank} read different manifests"
    return None


def _stage(
    root: Storage,
    tier: Tier | None,
    state: TrainState,
    found: _Candidate,
    board: Board,
    asked: Asked,
    spare: Sequence[memoryview],
) -> tuple[Staged, str]:
    """Read and check everything this rank needs; nothing live changes.

    Raises:
        DamagedError: the step does not verify.
        StateError: it does not fit the live state.
    """
    storage = tier.storage if found.local and tier is not None else root
    directory = step_dir(*found.pair)
    where = f"{storage.url}/{directory}/{MANIFEST}"
    manifest: StepManifest | None = None
    try:
        data = storage.read(f"{directory}/{MANIFEST}")
        manifest = StepManifest.from_bytes(data, where)
        if (manifest.step, manifest.epoch) != found.pair:
            msg = f"{where} is that of step {manifest.step}, writer {manifest.epoch}"
            raise DamagedError(msg)
        part = tier.part(directory) if found.local and tier is not None else None
        present = None if part is None else part.files
        if board.rank == 0 or found.local:  # a tier is cheap to ask, and is each node's own
            files = [f for f in manifest.files if present is None or f.name in present]
            for problem in check_sizes(storage, directory, files):
                raise DamagedError(problem.message)
        shared, ranks = read_state(storage, directory, manifest)
        check_base(state, manifest)
        live = state.live()
        staged = match(state, live, manifest, shared, ranks, strict=asked.strict, parts=asked.parts)
        pieces = local_pieces(staged.targets)
        staged.values = fetch(
            storage,
            directory,
            manifest if part is None else part.localised(manifest),
            pieces,
            rank=board.rank,
            world=board.world,
            present=present,
            spare=spare,
        )
    except StorageError as error:
        # A disk of the node that cannot be read is no reason not to ask the root.
        if found.local or isinstance(error, ObjectNotFound):
            raise DamagedError(str(error)) from error
        # A read behind the end of a cut file, most likely; then it is damage, not a broken store,
        # and every rank has to see it as that.
        if manifest is not None:
            for problem in check_sizes(storage, directory, manifest.files):
                raise DamagedError(problem.message) from error
        raise
    return staged, hashlib.sha256(data).hexdigest()


def _apply(state: TrainState, staged: Staged, board: Board, parts: frozenset[Part]) -> list[str]:
    """Copy the verified values into place.

    Raises:
        StateError: an object of the caller's refused its own saved value.
    """
    with torch.no_grad():
        if staged.values:
            targets = [local_tensor(staged.targets[name]) for name in staged.values]
            torch._foreach_copy_(targets, list(staged.values.values()))
    try:
        notes = state.apply_values(
            staged.shared, staged.ranks, staged.optimizer, board.rank, board.world, parts
        )
    except Exception as error:
        # They are the last word: nobody else can say whether their saved values are good.
        msg = (
            f"step {staged.manifest.step} verifies, but the live objects did not take what it "
            f"holds for them: {type(error).__name__}: {error}. The live state is partly that of "
            "the step; build it anew before anything else is done with it"
        )
        raise StateError(msg) from error
    for note in notes:
        logger.warning("restore of step %d: %s", staged.manifest.step, note)
    return notes
