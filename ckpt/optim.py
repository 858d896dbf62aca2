"""Optimizer state by parameter name, so that it survives any change of topology.

``Optimizer.state_dict()`` numbers parameters by their place in the groups; here every value
is addressed by the canonical FQN. Tensors go to the shards, everything else to JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from .errors import StateError
from .types import OPTIM_PREFIX

logger = logging.getLogger(__name__)

_IMPLEMENTATION = frozenset({"foreach", "fused", "capturable", "differentiable"})
"""Group options that choose a kernel, not a result: the live choice stays."""


def innermost(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer below wrappers: its state and its class's name are what a checkpoint keeps."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def parameter_names(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """The optimizer's parameters by canonical FQN, in group order.

    Args:
        optimizer: any torch optimizer.
        names: ``id(parameter)`` to canonical FQN, of all the model's parameters.

    Raises:
        StateError: the optimizer holds a parameter that the model does not.
    """
    found: dict[str, torch.Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            name = names.get(id(parameter))
            if name is None:
                msg = (
                    f"parameter {place} of optimizer group {number} (shape "
                    f"{tuple(parameter.shape)}) is not a parameter of the model; build the "
                    "optimizer from the sharded model's parameters"
                )
                raise StateError(msg)
            found[name] = parameter
    return found


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, params: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """``optim.<FQN>.<key>`` to tensor, for every tensor in the optimizer's state."""
    tensors = {}
    for name, parameter in params.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{OPTIM_PREFIX}{name}.{key}"] = value
    return tensors


def optimizer_values(
    optimizer: torch.optim.Optimizer, params: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """Everything of the optimizer that is not in the shards, by name.

    Returns:
        ``kind`` (class name), ``groups`` (hyperparameters with the FQNs under ``params``),
        ``values`` (FQN to its non-tensor state), ``tensors`` (FQN to the keys of its tensors).
    """
    by_id = {id(parameter): name for name, parameter in params.items()}
    groups = []
    for group in optimizer.param_groups:
        entry = {key: value for key, value in group.items() if key not in {"params", "param_names"}}
        entry["params"] = [by_id[id(parameter)] for parameter in group["params"]]
        groups.append(entry)
    values: dict[str, dict[str, Any]] = {}
    tensors: dict[str, list[str]] = {}
    for name, parameter in params.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors.setdefault(name, []).append(key)
            else:
                values.setdefault(name, {})[key] = value
    kind = type(optimizer).__name__
    return {"kind": kind, "groups": groups, "values": values, "tensors": tensors}


def state_target(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.Tensor],
    name: str,
    key: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The tensor that ``optim.<name>.<key>`` is restored into; made if there is none yet.

    A value shaped like its parameter is placed like it (same mesh and placements). A new tensor
    is not registered with the optimizer here: nothing live changes before all ranks agree. Its
    memory is not initialised either, since a restore writes all of it.

    Raises:
        StateError: the shape tells nothing about the placement and the parameter is sharded.
    """
    parameter = params[name]
    existing = optimizer.state.get(parameter, {}).get(key)
    if (
        isinstance(existing, torch.Tensor)
        and tuple(existing.shape) == shape
        and existing.dtype == dtype
    ):
        return existing
    if shape == tuple(parameter.shape):
        with torch.no_grad():
            return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if shape and isinstance(parameter, DTensor):
        msg = (
            f"optimizer state {key!r} of {name} has shape {shape}, its parameter "
            f"{tuple(parameter.shape)} is sharded, and the optimizer holds no such value yet; "
            "run one optimizer step before restore(), so that its placement is known"
        )
        raise StateError(msg)
    group = next(
        group
        for group in optimizer.param_groups
        if any(parameter is member for member in group["params"])
    )
    # torch keeps the step counter on the host unless a kernel on the device reads it.
    on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return torch.empty(shape, dtype=dtype, device="cpu" if on_host else parameter.device)


def group_problem(
    optimizer: torch.optim.Optimizer, params: Mapping[str, torch.Tensor], saved: Mapping[str, Any]
) -> str | None:
    """Why the saved hyperparameters cannot be given to the live groups, or None.

    A live group may be made of several saved ones only if these agree on everything.
    """
    if saved["kind"] != type(optimizer).__name__:
        return (
            f"the checkpoint was saved with {saved['kind']}, the live optimizer is "
            f"{type(optimizer).__name__}; build the same one, or leave it out: "
            "restore(parts=ALL_PARTS - {'optimizer'})"
        )
    live = optimizer_values(optimizer, params)["groups"]
    for number, group in enumerate(live):
        sources = _sources(group["params"], saved["groups"])
        for other in sources[1:]:
            for key in sorted({*sources[0], *other} - {"params"}):
                if sources[0].get(key) != other.get(key):
                    return (
                        f"optimizer group {number} joins parameters whose saved groups had "
                        f"different {key!r}: {sources[0].get(key)!r} and {other.get(key)!r}"
                    )
    return None


def apply_optimizer(
    optimizer: torch.optim.Optimizer,
    params: Mapping[str, torch.Tensor],
    saved: Mapping[str, Any],
    restored: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Give the optimizer its saved state: of what was saved, nothing of its own is left.

    Parameters that no saved group holds (only without ``strict``) keep theirs.

    Args:
        optimizer: the live optimizer.
        params: its parameters by FQN.
        saved: what :func:`optimizer_values` returned at the save.
        restored: FQN, then key, to the tensor that now holds the saved value.
    """
    known = {name for group in saved["groups"] for name in group["params"]}
    for name, parameter in params.items():
        if name not in known:
            continue
        fresh = {**saved["values"].get(name, {}), **restored.get(name, {})}
        if fresh:
            optimizer.state[parameter] = fresh
        else:
            optimizer.state.pop(parameter, None)
    by_id = {id(parameter): name for name, parameter in params.items()}
    for group in optimizer.param_groups:
        sources = _sources([by_id[id(p)] for p in group["params"]], saved["groups"])
        if not sources:
            continue
        for key, value in sources[0].items():
            if key == "params" or key in _IMPLEMENTATION:
                continue
            current = group.get(key)
            if isinstance(current, torch.Tensor):
                current.fill_(float(value))  # compiled and captured steps hold this very tensor
            else:
                group[key] = value


def take_scheduled_rates(optimizer: torch.optim.Optimizer, scheduler: Any) -> list[str]:
    """Give the groups the learning rates at which a restored schedule stands.

    A schedule writes its rates into the optimizer when it steps, and not when it is loaded. With
    the optimizer's own state left out, the next update would be made at the first step's rate.

    Args:
        optimizer: the live optimizer.
        scheduler: a schedule that was just loaded.

    Returns:
        A note that says so; nothing where the schedule is not one of this optimizer's.
    """
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return []
    rates = scheduler.get_last_lr()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(float(rate))
        else:
            group["lr"] = rate
    shown = ", ".join(f"{float(rate):g}" for rate in rates)
    return [f"optimizer: left as it is, at the restored schedule's learning rate ({shown})"]


def _sources(names: list[str], groups: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The saved groups that hold any of the names, in their saved order."""
    wanted = set(names)
    return [group for group in groups if wanted.intersection(group["params"])]
