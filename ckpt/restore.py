"""Restore: verify first, touch live tensors last, one decision for all ranks.

Rank 0 proposes steps of the lineage, newest first. Every rank checks the proposal against its
live state and fetches its bytes; only if all of them verified does any rank change anything. A
damaged step is reported and the next older one is proposed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .arena import local_tensor
from .catalog import check_sizes, read_writers
from .commit import newest_epoch
from .dtypes import TORCH_DTYPES, dtype_code
from .errors import BaseMismatch, CkptError, DamagedError, NoCheckpoint, ObjectNotFound, StateError
from .fetch import fetch
from .layout import MANIFEST, STATE, STEPS, check_step, parse_step_dir, step_dir
from .lineage import committed_lineage
from .manifest import StepManifest
from .optim import state_target
from .plan import local_pieces
from .state import decode_state
from .storage import Storage, read_checked
from .train_state import LiveTensors, TrainState
from .types import MODEL_PREFIX, OPTIM_PREFIX, TensorRecord
from .vote import Board, RemoteFailure

logger = logging.getLogger(__name__)

_SHOWN = 5


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
        damaged: newer steps that did not verify.
        missing: live names (or sections) that the checkpoint lacks (``strict=False`` only).
        extra: names of the checkpoint that are not live (``strict=False`` only).
        notes: what could not carry over exactly.
    """

    step: int | None
    epoch: int | None
    seen_epoch: int
    damaged: tuple[DamagedStep, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Staged:
    """A verified step, ready to be copied into place."""

    manifest: StepManifest
    values: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    shared: Mapping[str, Any]
    ranks: Sequence[Mapping[str, Any]]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def restore(
    storage: Storage,
    board: Board,
    topic: str,
    state: TrainState,
    *,
    step: int | None,
    strict: bool,
) -> RestoreReport:
    """Bring the newest valid step (or the one asked for) into the live state.

    Args:
        storage: the root.
        board: access to the other ranks; all of them call this.
        topic: a topic that no other exchange has.
        state: the live state.
        step: a step number, or None for the newest that verifies.
        strict: refuse a difference in names between the checkpoint and the live state.

    Raises:
        NoCheckpoint: no such step, or none of the root's steps is whole.
        DamagedError: the step asked for does not verify.
        StateError: names, shapes or dtypes differ; nothing was changed.
        BaseMismatch: the adapter was trained over another base model.
        StorageError: the store failed.
        SaveAborted: another rank failed; nothing was changed.
    """
    seen = 0
    candidates: list[tuple[int, int]] = []
    if board.rank == 0:
        try:
            seen = newest_epoch(storage)
            candidates = _candidates(storage, step)
        except CkptError as error:
            board.abort(f"{topic}/0/proposal", error)
            raise
    damaged: list[DamagedStep] = []
    for number in _count():
        here = f"{topic}/{number}"
        pair = _propose(board, here, candidates[number : number + 1], damaged)
        if pair is None:
            return RestoreReport(None, None, seen, tuple(damaged))
        staged = _agree(storage, board, here, state, pair, damaged, strict=strict)
        if staged is not None:
            notes = _apply(state, staged, board)
            return RestoreReport(
                *pair, seen, tuple(damaged), staged.missing, staged.extra, tuple(notes)
            )
        if step is not None:
            raise DamagedError(damaged[-1].reason)
    raise AssertionError  # the loop above only ends by return or raise


def _count() -> Iterable[int]:
    number = 0
    while True:
        yield number
        number += 1


def _candidates(storage: Storage, step: int | None) -> list[tuple[int, int]]:
    """(step, epoch) pairs to try, best first."""
    parsed = [parse_step_dir(entry.name) for entry in storage.list(STEPS) if entry.is_dir]
    found = [pair for pair in parsed if pair is not None]
    lineage = committed_lineage(read_writers(storage), found)
    if not storage.has_rename:
        # An object store shows unfinished attempts too; without a manifest they are no steps.
        lineage = [p for p in lineage if storage.exists(f"{step_dir(*p)}/{MANIFEST}")]
    if step is None:
        return lineage
    check_step(step)
    wanted = [pair for pair in lineage if pair[0] == step]
    if not wanted:
        have = ", ".join(str(pair[0]) for pair in lineage[:8]) or "none"
        hint = ""
        if any(pair[0] == step for pair in found):
            hint = "; it was abandoned when a later writer resumed from before it"
        msg = f"no step {step} in {storage.url}{hint}; newest steps: {have}"
        raise NoCheckpoint(msg)
    return wanted[:1]


def _propose(
    board: Board, topic: str, candidate: list[tuple[int, int]], damaged: list[DamagedStep]
) -> tuple[int, int] | None:
    """Rank 0 names the next step to try; all ranks learn it. None: the root is empty."""
    if board.rank == 0:
        if not candidate and damaged:
            reasons = "; ".join(entry.reason for entry in damaged)
            error = NoCheckpoint(f"none of the {len(damaged)} step(s) verifies: {reasons}")
            board.abort(f"{topic}/proposal", error)
            raise error
        value = list(candidate[0]) if candidate else None
        board.decide(f"{topic}/proposal", value)
    else:
        verdict = board.verdict(f"{topic}/proposal")
        if verdict.failure is not None:
            raise verdict.failure.rebuild(keep=True)
        value = verdict.value
    return None if value is None else (value[0], value[1])


def _agree(
    storage: Storage,
    board: Board,
    topic: str,
    state: TrainState,
    pair: tuple[int, int],
    damaged: list[DamagedStep],
    *,
    strict: bool,
) -> _Staged | None:
    """Stage a step on every rank; None (on every rank) if any found it damaged."""
    staged: _Staged | None = None
    own: CkptError | None = None
    try:
        staged, digest = _stage(storage, state, pair, board, strict=strict)
        board.answer(f"{topic}/check", {"digest": digest})
    except DamagedError as error:
        board.answer(f"{topic}/check", {"damaged": str(error)})
    except CkptError as error:
        own = error
        board.fail(f"{topic}/check", error)
    if board.rank == 0:
        try:
            value = _tally(board.gather(f"{topic}/check"))
            board.decide(f"{topic}/apply", value)
        except (CkptError, RemoteFailure) as error:
            failure = board.abort(f"{topic}/apply", error)
            raise (own or failure.rebuild(keep=True)) from error
    else:
        verdict = board.verdict(f"{topic}/apply")
        if verdict.failure is not None:
            raise own or verdict.failure.rebuild(keep=True)
        value = verdict.value
    if value is None:
        return staged
    step, epoch = pair
    reason = f"step {step} (writer {epoch}) of {storage.url} is damaged: {value}"
    logger.warning("%s; it is passed over", reason)
    damaged.append(DamagedStep(step, epoch, reason))
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
    storage: Storage, state: TrainState, pair: tuple[int, int], board: Board, *, strict: bool
) -> tuple[_Staged, str]:
    """Read and check everything this rank needs; nothing live changes.

    Raises:
        DamagedError: the step does not verify.
        StateError: it does not fit the live state.
    """
    directory = step_dir(*pair)
    where = f"{storage.url}/{directory}/{MANIFEST}"
    try:
        data = storage.read(f"{directory}/{MANIFEST}")
        manifest = StepManifest.from_bytes(data, where)
        if (manifest.step, manifest.epoch) != pair:
            msg = f"{where} is that of step {manifest.step}, writer {manifest.epoch}"
            raise DamagedError(msg)
        if board.rank == 0:
            for problem in check_sizes(storage, directory, manifest.files):
                raise DamagedError(problem.message)
        shared, ranks = _read_state(storage, directory, manifest)
        _check_base(state, manifest)
        live = state.live()
        staged = _match(state, live, manifest, shared, ranks, strict=strict)
        pieces = local_pieces(staged.targets)
        staged.values = fetch(
            storage, directory, manifest, pieces, rank=board.rank, world=board.world
        )
    except ObjectNotFound as error:
        raise DamagedError(str(error)) from error
    return staged, hashlib.sha256(data).hexdigest()


def _read_state(
    storage: Storage, directory: str, manifest: StepManifest
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    record = next((file for file in manifest.files if file.name.rpartition("/")[2] == STATE), None)
    if record is None:
        msg = f"{storage.url}/{directory}/{MANIFEST} lists no {STATE}"
        raise DamagedError(msg)
    path = f"{directory}/{record.name}"
    value = decode_state(read_checked(storage, path, record), f"{storage.url}/{path}")
    return value["shared"], value["ranks"]


def _check_base(state: TrainState, manifest: StepManifest) -> None:
    if state.base is None or manifest.base is None:
        return
    if state.base.config_hash != manifest.base.config_hash:
        msg = (
            f"step {manifest.step} was trained over base model {manifest.base.name!r} "
            f"(config {manifest.base.config_hash[:12]}), the live base is {state.base.name!r} "
            f"(config {state.base.config_hash[:12]}); load the base it was trained over"
        )
        raise BaseMismatch(msg)


def _match(
    state: TrainState,
    live: LiveTensors,
    manifest: StepManifest,
    shared: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    *,
    strict: bool,
) -> _Staged:
    """Pair every stored tensor with the live one it goes to.

    Raises:
        StateError: names (if ``strict``), shapes or dtypes differ; lists them.
    """
    records = {record.name: record for record in manifest.tensors}
    model = {name: t for name, t in live.tensors.items() if name.startswith(MODEL_PREFIX)}
    missing = [name for name in model if name not in records]
    extra = [n for n in records if n.startswith(MODEL_PREFIX) and n not in model]
    targets = {name: tensor for name, tensor in model.items() if name in records}
    _check_alike(targets, records)
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    if state.optimizer is not None and shared["optimizer"] is not None:
        saved = shared["optimizer"]
        grouped = {name for group in saved["groups"] for name in group["params"]}
        missing += [f"{OPTIM_PREFIX}{n}" for n in live.optimizer_params if n not in grouped]
        extra += [f"{OPTIM_PREFIX}{n}" for n in sorted(grouped) if n not in live.optimizer_params]
        for fqn, keys in saved["tensors"].items():
            if fqn not in live.optimizer_params:
                continue
            for key in keys:
                name = f"{OPTIM_PREFIX}{fqn}.{key}"
                record = records.get(name)
                if record is None:
                    msg = f"step {manifest.step}: {STATE} names {name}, which no shard holds"
                    raise DamagedError(msg)
                target = state_target(
                    state.optimizer,
                    live.optimizer_params,
                    fqn,
                    key,
                    record.shape,
                    TORCH_DTYPES[record.dtype],
                )
                optimizer.setdefault(fqn, {})[key] = target
                targets[name] = target
    sections = state.problems(shared, ranks)
    if strict and (missing or extra or sections):
        raise StateError(_difference(manifest, missing, extra, sections))
    for problem in (*missing, *extra, *sections):
        logger.warning(
            "restore of step %d: %s does not match; left as it is", manifest.step, problem
        )
    return _Staged(
        manifest, {}, targets, optimizer, shared, ranks, (*missing, *sections), tuple(extra)
    )


def _check_alike(targets: Mapping[str, torch.Tensor], records: Mapping[str, TensorRecord]) -> None:
    wrong = []
    for name, tensor in targets.items():
        record = records[name]
        live = (dtype_code(tensor.dtype), tuple(tensor.shape))
        if live != (record.dtype, record.shape):
            wrong.append(
                f"{name} is {record.dtype} {list(record.shape)} in the checkpoint and "
                f"{live[0]} {list(live[1])} here"
            )
    if wrong:
        more = f" (and {len(wrong) - _SHOWN} more)" if len(wrong) > _SHOWN else ""
        msg = f"shapes or dtypes differ: {'; '.join(wrong[:_SHOWN])}{more}; nothing was changed"
        raise StateError(msg)


def _difference(
    manifest: StepManifest, missing: list[str], extra: list[str], sections: list[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"the checkpoint lacks {_some(missing)}")
    if extra:
        parts.append(f"the live state lacks {_some(extra)}")
    parts += sections
    return (
        f"step {manifest.step} does not fit the live state: {'; '.join(parts)}. Nothing was "
        "changed; build the same state, or pass strict=False to restore what fits"
    )


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _apply(state: TrainState, staged: _Staged, board: Board) -> list[str]:
    """Copy the verified values into place."""
    with torch.no_grad():
        for name, value in staged.values.items():
            local_tensor(staged.targets[name]).copy_(value)
    notes = state.apply_values(
        staged.shared, staged.ranks, staged.optimizer, board.rank, board.world
    )
    for note in notes:
        logger.warning("restore of step %d: %s", staged.manifest.step, note)
    return notes
