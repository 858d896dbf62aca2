"""One state of many parts: what ranks, or optimizers, with different parameters hold together.

Pipeline stages hold different parameters, and each has an optimizer of its own, which numbers its
parameters from 0. Here the values that belong to all of them are put together by name. The result
is what one optimizer over all parameters would have given, so that it fits any other division.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import StateError
from .state import encode_state


def join_optimizers(parts: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """One description of an optimizer from those of its parts.

    Groups that agree on every hyperparameter become one. A parameter may be in several parts
    (replicas of a stage), if all of them say the same about it.

    Args:
        parts: what :func:`ckpt.optim.optimizer_values` gave for each; None for a part without an
            optimizer.

    Returns:
        A value of the same form, or None if no part has an optimizer.

    Raises:
        StateError: the parts are of different classes, or disagree about a parameter.
    """
    there = [part for part in parts if part is not None]
    if not there:
        return None
    kinds = sorted({part["kind"] for part in there})
    if len(kinds) > 1:
        msg = (
            f"the parts of one state have optimizers of different classes ({', '.join(kinds)}); "
            "build all of them of one class"
        )
        raise StateError(msg)
    groups: dict[bytes, dict[str, Any]] = {}
    home: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for part in there:
        for group in part["groups"]:
            settings = {key: value for key, value in group.items() if key != "params"}
            same = encode_state(sorted(settings.items()))
            joined = groups.setdefault(same, {**settings, "params": []})
            for name in group["params"]:
                if home.setdefault(name, same) != same:
                    raise _disagree(name, "the group it is in")
                if name not in joined["params"]:
                    joined["params"].append(name)
        for what, found, into in (
            ("its values", part["values"], values),
            ("its tensors", part["tensors"], tensors),
        ):
            for name, value in found.items():
                if encode_state(into.setdefault(name, value)) != encode_state(value):
                    raise _disagree(name, what)
    # A part without parameters may have a group that nobody else has: it has nothing to say.
    kept = [group for group in groups.values() if group["params"]]
    return {
        "kind": kinds[0],
        "groups": kept or list(groups.values())[:1],
        "values": values,
        "tensors": tensors,
    }


def _disagree(name: str, what: str) -> StateError:
    return StateError(
        f"the optimizers of several parts hold {name} and differ in {what}; replicas of a "
        "pipeline stage must be trained alike"
    )


def join_schedules(parts: Sequence[Any]) -> Any:
    """The state that the schedules of all parts have in common.

    Args:
        parts: the schedules' states; None for a part without one.

    Returns:
        That state, or None if no part has one.

    Raises:
        StateError: they differ, so that no single value would be right for all of them.
    """
    there = [part for part in parts if part is not None]
    if any(encode_state(part) != encode_state(there[0]) for part in there[1:]):
        msg = (
            "the schedules of the parts of one state differ; step all of them alike, or pass what "
            "differs from rank to rank as TrainState(per_rank=...)"
        )
        raise StateError(msg)
    return there[0] if there else None


def held_by_nobody(lacking: Sequence[Sequence[str]]) -> list[str]:
    """Names that are lacking on every rank, in the order of the first one's.

    Args:
        lacking: the names that each rank lacks.
    """
    others = [set(names) for names in lacking[1:]]
    return [name for name in lacking[0] if all(name in names for names in others)]
