"""Does a stored step fit the live state? Every difference is found before anything is touched."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .dtypes import TORCH_DTYPES, dtype_code
from .errors import BaseMismatch, DamagedError, StateError
from .layout import MANIFEST, STATE
from .manifest import StepManifest
from .optim import state_target
from .stages import held_by_nobody
from .state import decode_state
from .state_form import check_form
from .state_parts import ALL_PARTS, Part
from .storage import Storage, read_checked
from .train_state import LiveTensors, TrainState
from .types import MODEL_PREFIX, OPTIM_PREFIX, TensorRecord

logger = logging.getLogger(__name__)

_SHOWN = 5


@dataclass(slots=True)
class Staged:
    """A verified step, ready to be copied into place.

    ``elsewhere`` names what a parted state does not hold on this rank: other ranks may.
    """

    manifest: StepManifest
    values: dict[str, torch.Tensor]
    targets: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, torch.Tensor]]
    shared: Mapping[str, Any]
    ranks: Sequence[Mapping[str, Any]]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()


def read_state(
    storage: Storage, directory: str, manifest: StepManifest
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """Decode ``state.json``: the shared values, and those of each rank.

    Raises:
        DamagedError: it does not verify, or has not the form of a trainer's state.
        StateError: the step was not saved from a :class:`TrainState`.
    """
    record = next((file for file in manifest.files if file.name.rpartition("/")[2] == STATE), None)
    if record is None:
        msg = f"{storage.url}/{directory}/{MANIFEST} lists no {STATE}"
        raise DamagedError(msg)
    path = f"{directory}/{record.name}"
    where = f"{storage.url}/{path}"
    value = decode_state(read_checked(storage, path, record), where)
    if not isinstance(value, dict) or value.keys() != {"shared", "ranks"}:
        msg = f"{where} is not a trainer's state; what ckpt.dcp.Writer wrote is read by dcp.load"
        raise StateError(msg)
    return check_form(value["shared"], value["ranks"], where)


def check_base(state: TrainState, manifest: StepManifest) -> None:
    """Refuse a step of another base model.

    Raises:
        BaseMismatch: the two configurations differ.
    """
    if state.base is None or manifest.base is None:
        return
    if state.base.config_hash != manifest.base.config_hash:
        msg = (
            f"step {manifest.step} was trained over base model {manifest.base.name!r} "
            f"(config {manifest.base.config_hash[:12]}), the live base is {state.base.name!r} "
            f"(config {state.base.config_hash[:12]}); load the base it was trained over"
        )
        raise BaseMismatch(msg)


def match(
    state: TrainState,
    live: LiveTensors,
    manifest: StepManifest,
    shared: Mapping[str, Any],
    ranks: Sequence[Mapping[str, Any]],
    *,
    strict: bool,
    parts: frozenset[Part] = ALL_PARTS,
) -> Staged:
    """Pair every stored tensor with the live one it goes to.

    Args:
        state: the live state.
        live: its tensors.
        manifest: the step's.
        shared: what its ``state.json`` holds for all ranks.
        ranks: what it holds for each.
        strict: refuse a difference in names.
        parts: the parts that are wanted; what belongs to others is not looked at.

    Raises:
        StateError: names (if ``strict``), shapes or dtypes differ; lists them.
    """
    records = {record.name: record for record in manifest.tensors}
    model: dict[str, torch.Tensor] = {}
    missing, extra = [], []
    if Part.MODEL in parts:
        model = {name: t for name, t in live.tensors.items() if name.startswith(MODEL_PREFIX)}
        missing = [name for name in model if name not in records]
        extra = [n for n in records if n.startswith(MODEL_PREFIX) and n not in model]
    targets = {name: tensor for name, tensor in model.items() if name in records}
    _check_alike(targets, records)
    optimizer: dict[str, dict[str, torch.Tensor]] = {}
    holds = state.optimizers or state.parted
    if Part.OPTIMIZER in parts and holds and shared["optimizer"] is not None:
        saved = shared["optimizer"]
        grouped = {name for group in saved["groups"] for name in group["params"]}
        # Optimizers are often built over all parameters. The frozen ones among them have no state
        # and are not saved: whether an optimizer holds them makes no difference.
        missing += [
            f"{OPTIM_PREFIX}{name}"
            for name in live.optimizer_params
            if name not in grouped and MODEL_PREFIX + name in live.tensors
        ]
        extra += [
            f"{OPTIM_PREFIX}{name}"
            for name in sorted(grouped)
            if name not in live.optimizer_params and MODEL_PREFIX + name in records
        ]
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
                    live.owners[fqn],
                    live.optimizer_params,
                    fqn,
                    key,
                    record.shape,
                    TORCH_DTYPES[record.dtype],
                )
                optimizer.setdefault(fqn, {})[key] = target
                targets[name] = target
    sections = state.problems(shared, ranks, parts)
    elsewhere: list[str] = []
    if state.parted:
        elsewhere, extra = extra, []
    if strict and (missing or extra or sections):
        raise StateError(_difference(manifest.step, missing, extra, sections))
    for problem in (*missing, *extra, *sections):
        logger.warning(
            "restore of step %d: %s does not match; left as it is", manifest.step, problem
        )
    return Staged(
        manifest,
        {},
        targets,
        optimizer,
        shared,
        ranks,
        (*missing, *sections),
        tuple(extra),
        tuple(elsewhere),
    )


def check_union(step: int, lacking: Sequence[Sequence[str]], *, strict: bool) -> list[str]:
    """Stored names that no rank of a parted state holds.

    Args:
        step: the step's number.
        lacking: ``Staged.elsewhere`` of every rank; empty where the state is not parted.
        strict: refuse such names.

    Raises:
        StateError: there are some (if ``strict``); lists them.
    """
    extra = held_by_nobody(lacking)
    if extra and strict:
        raise StateError(_difference(step, [], extra, []))
    for problem in extra:
        logger.warning("restore of step %d: no rank holds %s; left out", step, problem)
    return extra


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


def _difference(step: int, missing: list[str], extra: list[str], sections: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"the checkpoint lacks {_some(missing)}")
    if extra:
        parts.append(f"the live state lacks {_some(extra)}")
    parts += sections
    return (
        f"step {step} does not fit the live state: {'; '.join(parts)}. Nothing was "
        "changed; build the same state, pass strict=False to restore what fits, or parts=... to "
        "restore some parts only"
    )


def _some(names: list[str]) -> str:
    more = f" (and {len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
