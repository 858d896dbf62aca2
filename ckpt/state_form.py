"""The form of a trainer's ``state.json``, checked before anything live is touched.

The checksum proves that the bytes are those that were written, not that their writer was one of
ours. What belongs to the user's own objects (schedule, data position, ``per_rank``) stays opaque.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch

from .errors import DamagedError

_SHARED = frozenset({"optimizer", "scheduler", "extra"})
_OPTIMIZER = frozenset({"kind", "groups", "values", "tensors"})
_RANK = frozenset({"rng", "dataloader", "per_rank"})
_RNG = frozenset({"python", "numpy", "torch", "cuda"})


def check_form(
    shared: Any, ranks: Any, where: str
) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
    """The two halves of a trainer's state, once they have the form that this package writes.

    Args:
        shared: what is claimed to be equal on all ranks.
        ranks: what is claimed to be each rank's own.
        where: the file's path, for the message.

    Raises:
        DamagedError: names the member that is not what it should be.
    """
    _members(shared, _SHARED, "shared", where)
    if not isinstance(shared["extra"], dict):
        _refuse(where, "shared.extra")
    if shared["optimizer"] is not None:
        _check_optimizer(shared["optimizer"], where)
    if not isinstance(ranks, list) or not ranks:
        _refuse(where, "ranks")
    for number, rank in enumerate(ranks):
        _members(rank, _RANK, f"ranks[{number}]", where)
        if not _texts(rank["per_rank"]):
            _refuse(where, f"ranks[{number}].per_rank")
        _check_rng(rank["rng"], f"ranks[{number}].rng", where)
    return shared, ranks


def _check_optimizer(value: Any, where: str) -> None:
    place = "shared.optimizer"
    _members(value, _OPTIMIZER, place, where)
    if not isinstance(value["kind"], str):
        _refuse(where, f"{place}.kind")
    groups = value["groups"]
    if not isinstance(groups, list) or not all(
        _texts(group) and _names(group.get("params")) for group in groups
    ):
        _refuse(where, f"{place}.groups")
    if not _texts(value["values"]) or not all(map(_texts, value["values"].values())):
        _refuse(where, f"{place}.values")
    if not _texts(value["tensors"]) or not all(map(_names, value["tensors"].values())):
        _refuse(where, f"{place}.tensors")


def _check_rng(value: Any, place: str, where: str) -> None:
    """Try the states on generators of our own: only the generators know what they accept."""
    _members(value, _RNG, place, where)
    try:
        random.Random().setstate(value["python"])
        torch.Generator().set_state(value["torch"])
        if value["numpy"] is not None:
            import numpy as np

            np.random.RandomState().set_state(value["numpy"])
    except (TypeError, ValueError, RuntimeError, LookupError, OverflowError) as error:
        _refuse(where, f"{place}: {error}")
    states = value["cuda"]
    if not isinstance(states, list) or not all(
        isinstance(state, torch.Tensor) and state.dtype == torch.uint8 for state in states
    ):
        _refuse(where, f"{place}.cuda")


def _members(value: Any, wanted: frozenset[str], place: str, where: str) -> None:
    if not isinstance(value, dict) or value.keys() != wanted:
        _refuse(where, place)


def _texts(value: Any) -> bool:
    """Whether the value is a dict whose keys are texts."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _names(value: Any) -> bool:
    """Whether the value is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _refuse(where: str, place: str) -> NoReturn:
    msg = f"{where}: {place[:200]} is not what a trainer saves there"
    raise DamagedError(msg)
