"""Which entry of a stock DCP checkpoint becomes what of a trainer's step.

======================================  =====================================================
in the checkpoint                       in the step
======================================  =====================================================
``<model>.<FQN>``, a tensor             ``model.<FQN>``
``<optim>.state.<FQN>.<key>``           ``optim.<FQN>.<key>`` (a tensor), else a value of it
``<optim>.param_groups.…``              the optimizer's groups
``scheduler.…`` or ``lr_scheduler.…``   the scheduler's state
``extra.…``                             ``extra``
``trainer_state``                       schedule, ``extra`` and each rank's state, exactly, in
                                        the place of the two above (``ckpt export`` writes it)
anything else that is small             ``extra``, under its first name
======================================  =====================================================

``<model>`` is ``model`` and ``<optim>`` the first of ``optim`` and ``optimizer`` that is there,
unless named. What has no place is refused by name, never left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import torch

from ckpt.errors import ConfigError, StateError
from ckpt.fqn import canonical_fqn
from ckpt.state import decode_state
from ckpt.types import MODEL_PREFIX, OPTIM_PREFIX

from .nested import nest
from .stock import StockCheckpoint

TRAINER: Final = "trainer_state"
_TRAINER_MEMBERS: Final = frozenset({"kind", "scheduler", "extra", "ranks"})
_RANK_MEMBERS: Final = frozenset({"rng", "dataloader", "per_rank"})
_OPTIM_NAMES: Final = ("optim", "optimizer")
_SCHEDULER_NAMES: Final = ("scheduler", "lr_scheduler")
_STATE: Final = ".state."
_GROUPS: Final = ".param_groups."
_SMALL_ELEMENTS: Final = 16_384
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller says about the names.

    Attributes:
        model: prefix of the model's tensors; ``""`` if they lie at the top.
        optim: prefix of the optimizer, or None to look for it.
        optimizer: class name of the optimizer, or None to tell it from the groups.
        skip: names (or first parts of names) that are left out.
    """

    model: str = "model"
    optim: str | None = None
    optimizer: str | None = None
    skip: tuple[str, ...] = ()


@dataclass(slots=True)
class Mapped:
    """The result.

    Attributes:
        tensors: name in the step to name in the checkpoint.
        shared: what is equal on all ranks, by section of ``state.json``.
        ranks: what each rank had, or empty if the checkpoint does not say.
        kind: class name of the optimizer, or None if the checkpoint does not say.
        skipped: names that the caller had left out.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    ranks: list[Any] = field(default_factory=list)
    kind: str | None = None
    skipped: list[str] = field(default_factory=list)


def map_names(source: StockCheckpoint, choices: Choices) -> Mapped:
    """Give everything in the checkpoint its place.

    Raises:
        ConfigError: a choice that matches nothing.
        StateError: an entry without a place, or one that is not plain data.
        DamagedError: an entry that cannot be read.
    """
    every = [*source.tensors, *source.entries]
    skipped = [name for name in every if any(_below(name, part) for part in choices.skip)]
    for part in choices.skip:
        if not any(_below(name, part) for name in every):
            raise ConfigError(f"--skip {part}: nothing in {source.url} has that name")
    names = [name for name in every if name not in set(skipped)]
    optim = _optim_prefix(source, names, choices.optim)
    mapped = Mapped(skipped=skipped)
    optimizer, rest = [], []
    for name in names:
        if optim is not None and _below(name, optim):
            optimizer.append(name)
        elif name in source.tensors and _is_model(source, name, choices.model):
            _take(mapped.tensors, MODEL_PREFIX, _fqn(name, choices.model), name)
        else:
            rest.append(name)
    if not mapped.tensors:
        tops = ", ".join(sorted({name.partition(".")[0] for name in names})[:10]) or "nothing"
        msg = (
            f"{source.url}: no tensor lies under {choices.model!r}; the first parts of its names "
            f"are: {tops}. Name the model's with --model (or --model '' for none)"
        )
        raise StateError(msg)
    _map_rest(source, mapped, rest, choices.model)
    mapped.shared["optimizer"] = None
    if optimizer:
        reader = _OptimizerMap(source, str(optim), mapped)
        mapped.shared["optimizer"] = reader.read(optimizer, choices.optimizer or mapped.kind)
    return mapped


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def _is_model(source: StockCheckpoint, name: str, model: str) -> bool:
    if model:
        return name.startswith(f"{model}.")
    return not any(_below(name, top) for top in (*_SCHEDULER_NAMES, "extra"))


def _fqn(name: str, prefix: str) -> str:
    return canonical_fqn(name.removeprefix(f"{prefix}.") if prefix else name)


def _take(tensors: dict[str, str], prefix: str, inner: str, name: str) -> None:
    target = prefix + inner
    if target in tensors:
        msg = f"{tensors[target]!r} and {name!r} would both be {target!r}"
        raise StateError(msg)
    tensors[target] = name


def _optim_prefix(source: StockCheckpoint, names: Iterable[str], named: str | None) -> str | None:
    known = list(names)
    for prefix in _OPTIM_NAMES if named is None else (named,):
        if any(name.startswith((prefix + _STATE, prefix + _GROUPS)) for name in known):
            return prefix
    if named is not None:
        msg = f"--optim {named}: {source.url} has no {named}{_STATE}* and no {named}{_GROUPS}*"
        raise ConfigError(msg)
    return None


def _map_rest(source: StockCheckpoint, mapped: Mapped, rest: list[str], model: str) -> None:
    """Schedule, extra values, and what each rank had."""
    if TRAINER in rest:
        _map_exact(source, mapped)
        same = (*_SCHEDULER_NAMES, "extra")  # the text has these in their exact form
        rest = [n for n in rest if n != TRAINER and not any(_below(n, top) for top in same)]
    values = {name: _read_small(source, name, model) for name in rest}
    tree = nest(values, source.paths)
    schedulers = [name for name in _SCHEDULER_NAMES if name in tree]
    if len(schedulers) > 1:
        msg = f"{source.url} has both {' and '.join(schedulers)}; leave one out with --skip"
        raise StateError(msg)
    scheduler = tree.pop(schedulers[0]) if schedulers else None
    mapped.shared.setdefault("scheduler", scheduler)
    extra = tree.pop("extra", {})
    if not isinstance(extra, dict):
        extra = {"extra": extra}
    extra = mapped.shared.get("extra", extra)
    both = sorted(extra.keys() & tree.keys())
    if both:
        msg = f"{source.url}: {both[0]!r} is in 'extra' and beside it; leave one out with --skip"
        raise StateError(msg)
    mapped.shared["extra"] = extra | tree


def _read_small(source: StockCheckpoint, name: str, model: str) -> Any:
    """A value that is neither the model's nor the optimizer's."""
    if model and _below(name, model):
        msg = f"{source.url}: {name!r} is no tensor; leave it out with --skip {name}"
        raise StateError(msg)
    tensor = source.tensors.get(name)
    if tensor is None:
        return source.read_entry(name)
    if not 0 < torch.Size(tensor.shape).numel() <= _SMALL_ELEMENTS:
        msg = (
            f"{source.url}: tensor {name!r} of shape {list(tensor.shape)} is neither the model's "
            "nor the optimizer's; name these with --model and --optim, or leave it out with "
            f"--skip {name}"
        )
        raise StateError(msg)
    return source.read_tensor(name)


def _map_exact(source: StockCheckpoint, mapped: Mapped) -> None:
    """Take over what ``ckpt export --format dcp`` wrote as text."""
    where = f"{source.url}: {TRAINER}"
    text = source.read_entry(TRAINER) if TRAINER in source.entries else None
    value = decode_state(text.encode("ascii", "replace"), where) if isinstance(text, str) else None
    if not isinstance(value, dict) or value.keys() != _TRAINER_MEMBERS or not _ranks_ok(value):
        msg = f"{where} is not what `ckpt export --format dcp` writes; leave it out with --skip"
        raise StateError(msg)
    mapped.kind = value["kind"]
    mapped.shared |= {"scheduler": value["scheduler"], "extra": value["extra"]}
    mapped.ranks = value["ranks"]


def _ranks_ok(value: Mapping[str, Any]) -> bool:
    ranks, extra = value["ranks"], value["extra"]
    return (
        isinstance(extra, dict)
        and isinstance(ranks, list)
        and bool(ranks)
        and all(isinstance(rank, dict) and rank.keys() >= _RANK_MEMBERS for rank in ranks)
    )


class _OptimizerMap:
    """State and groups of an optimizer, in either of the two forms that DCP's helpers save.

    ``get_optimizer_state_dict`` gives groups by number, with the FQNs under ``params``; with
    ``flatten_optimizer_state_dict`` it gives every hyperparameter once a parameter, by FQN.
    """

    def __init__(self, source: StockCheckpoint, prefix: str, mapped: Mapped) -> None:
        self._source = source
        self._prefix = prefix
        self._mapped = mapped
        self._tensors: dict[str, list[str]] = {}
        self._values: dict[str, dict[str, Any]] = {}
        self._hyper: dict[str, dict[str, Any]] = {}

    def read(self, names: Iterable[str], kind: str | None) -> dict[str, Any]:
        """The section ``optimizer`` of ``state.json``; the tensors are noted in the map."""
        for name in names:
            inner = name.removeprefix(self._prefix)
            if inner.startswith(_STATE):
                self._state(name, inner.removeprefix(_STATE))
            elif inner.startswith(_GROUPS):
                self._hyperparameter(name, inner.removeprefix(_GROUPS))
            else:
                self._refuse(name, "is neither state nor param_groups")
        groups = self._groups()
        return {
            "kind": kind or self._kind(groups),
            "groups": groups,
            "values": self._values,
            "tensors": self._tensors,
        }

    def _refuse(self, name: str, why: str) -> NoReturn:
        msg = f"{self._source.url}: {name!r} {why}; leave it out with --skip {name}"
        raise StateError(msg)

    def _state(self, name: str, inner: str) -> None:
        fqn, _, key = inner.rpartition(".")
        if not fqn or fqn.isdecimal():
            msg = (
                f"{self._source.url}: {name!r} goes by number, not by the parameter's name; save "
                "with torch.distributed.checkpoint.state_dict.get_optimizer_state_dict, or leave "
                f"the optimizer out with --skip {self._prefix}"
            )
            raise StateError(msg)
        fqn = canonical_fqn(fqn)
        if name in self._source.tensors:
            _take(self._mapped.tensors, OPTIM_PREFIX, f"{fqn}.{key}", name)
            self._tensors.setdefault(fqn, []).append(key)
        else:
            self._values.setdefault(fqn, {})[key] = self._source.read_entry(name)

    def _hyperparameter(self, name: str, inner: str) -> None:
        first = inner.partition(".")[0]
        members = f"{self._prefix}{_GROUPS}{first}.params"
        numbered = first.isdecimal() and members in self._source.entries
        owner, _, key = inner.partition(".") if numbered else inner.rpartition(".")
        if not owner or not key or "." in key:
            self._refuse(name, "is not one hyperparameter of a group")
        read: Callable[[str], Any] = (
            self._source.read_tensor if name in self._source.tensors else self._source.read_entry
        )
        owner = owner if numbered else f".{canonical_fqn(owner)}"
        self._hyper.setdefault(owner, {})[key] = read(name)

    def _groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = []
        for owner, hyper in self._hyper.items():
            if not owner.startswith("."):
                names = hyper.get("params")
                if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
                    self._refuse(f"{self._prefix}{_GROUPS}{owner}", "does not name its parameters")
                groups.append({**hyper, "params": [canonical_fqn(name) for name in names]})
                continue
            for group in groups:
                if _alike({k: v for k, v in group.items() if k != "params"}, hyper):
                    group["params"].append(owner[1:])
                    break
            else:
                groups.append({**hyper, "params": [owner[1:]]})
        grouped = {name for group in groups for name in group["params"]}
        lost = sorted((self._tensors.keys() | self._values.keys()) - grouped)
        if lost:
            more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
            msg = (
                f"{self._source.url}: no parameter group names {', '.join(lost[:_SHOWN])}{more}, "
                "for which the optimizer has state"
            )
            raise StateError(msg)
        return groups

    def _kind(self, groups: list[dict[str, Any]]) -> str:
        keys = {key for names in self._tensors.values() for key in names}
        if "exp_avg" in keys and all("decoupled_weight_decay" in group for group in groups):
            return "AdamW" if groups[0]["decoupled_weight_decay"] else "Adam"
        msg = (
            f"{self._source.url} does not say which optimizer it is from; name its class, for "
            "example --optimizer AdamW"
        )
        raise StateError(msg)


def _alike(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    for key, value in first.items():
        other = second[key]
        same = (
            torch.equal(value, other)
            if isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor)
            else type(value) is type(other) and value == other
        )
        if not same:
            return False
    return True
