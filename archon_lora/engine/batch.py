"""Batches: how rows become micro batches, and how weights and losses meet over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from .groups import Groups

Batch = Mapping[str, Tensor]
"""Tensors by name; the first dimension of each is the row."""

LossFn = Callable[[Tensor, Batch], Tensor]
"""(logits [B, S, V], micro batch) to the *mean* loss over what the weight counts (0-d)."""

WeightFn = Callable[[Batch], float]
"""Micro batch to its weight in the mean over all ranks, e.g. the number of tokens that count."""


def batch_rows(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The batch on the device.

    Raises:
        ValueError: no ``input_ids`` of two dimensions, or tensors that differ in rows.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        got = "none" if ids is None else f"shape {tuple(ids.shape)}"
        msg = f"a batch needs input_ids of shape [rows, tokens], got {got}"
        raise ValueError(msg)
    rows = ids.shape[0]
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != rows:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            msg = f"every entry of a batch must have {rows} rows like input_ids; {name} is {shape}"
            raise ValueError(msg)
    return {name: value.to(device) for name, value in batch.items()}


def check_same_rows(batch: Batch, groups: Groups) -> None:
    """Make sure that ranks which share layers, or have other layers, were given the same rows.

    Raises:
        ValueError: they were not; on all ranks that are concerned.
    """
    shared = [mesh for mesh in (groups.mesh.tp, groups.mesh.pp) if mesh is not None]
    if not shared:
        return
    ids = batch["input_ids"]
    places = torch.arange(1, ids.numel() + 1, device=ids.device)
    seen = torch.stack([*map(ids.new_tensor, ids.shape), (ids.flatten() * places).sum()])
    # The largest of a number and of its opposite: equal but for the sign where all agree.
    both = torch.cat((seen, -seen))
    for mesh in shared:
        dist.all_reduce(both, dist.ReduceOp.MAX, group=mesh.get_group())
    most, least = both.chunk(2)
    if not torch.equal(most, -least):
        msg = (
            "ranks of one tensor-parallel group, or of one pipeline, were given different "
            "input_ids; split a batch by engine.dp_rank and engine.dp_size, not by rank"
        )
        raise ValueError(msg)


def default_weight(batch: Batch) -> float:
    """The number of rows."""
    return float(batch["input_ids"].shape[0])


def split_batch(batch: Batch, micro_batches: int, groups: Groups) -> list[dict[str, Tensor]]:
    """Split this rank's rows into ``micro_batches`` parts of nearly equal size.

    Every rank runs the same number of parts, because each forward and backward is a collective.

    Raises:
        ValueError: on every rank, if a rank has a malformed batch or fewer rows than parts.
    """
    problem: ValueError | None = None
    on_device: dict[str, Tensor] = {}
    parts: list[dict[str, Tensor]] = []
    try:
        on_device = batch_rows(batch, groups.device)
        rows = on_device["input_ids"].shape[0]
        _check_rows(rows, micro_batches, even=groups.mesh.pp is not None)
        pieces = {k: torch.tensor_split(v, micro_batches) for k, v in on_device.items()}
        parts = [{k: v[i] for k, v in pieces.items()} for i in range(micro_batches)]
    except ValueError as error:
        problem = error
    # Asked of all ranks before anybody enters a collective that the others would never join.
    failed = torch.tensor([int(problem is not None)], device=groups.device)
    dist.all_reduce(failed, group=groups.world)
    if problem is not None:
        raise problem
    if int(failed):
        msg = f"{int(failed)} other rank(s) have a batch that cannot be used; see their errors"
        raise ValueError(msg)
    check_same_rows(on_device, groups)
    return parts


def _check_rows(rows: int, micro_batches: int, *, even: bool) -> None:
    if rows < micro_batches:
        msg = f"{rows} rows cannot make {micro_batches} micro batches; lower micro_batches"
        raise ValueError(msg)
    if even and rows % micro_batches:
        msg = (
            f"{rows} rows do not make {micro_batches} micro batches of one size, which stages of "
            "a pipeline pass on; choose micro_batches that divides the rows"
        )
        raise ValueError(msg)


def total_weight(weights: list[float], groups: Groups) -> float:
    """Sum of the weights of all micro batches of all rows.

    Raises:
        ValueError: on every rank, if a weight is negative or not finite, or all are zero.
    """
    good = all(math.isfinite(w) and w >= 0 for w in weights)
    mine = sum(weights) if good else math.nan
    total = torch.tensor([mine], dtype=torch.float64, device=groups.device)
    dist.all_reduce(total, group=groups.dp_group)
    if not float(total) > 0:
        msg = (
            "the weights of a batch must be finite, >= 0 and not all zero; "
            f"this rank has {weights}, the sum over ranks is {float(total)}"
        )
        raise ValueError(msg)
    return float(total)


def reduce_losses(losses: list[Tensor], groups: Groups) -> float:
    """Sum of weighted losses (0-d, float64) over micro batches and ranks.

    Ranks of a pipeline without its last stage have none.
    """
    total = torch.zeros(1, dtype=torch.float64, device=groups.device)
    for loss in losses:
        total += loss
    dist.all_reduce(total, group=groups.dp_group)
    if groups.mesh.pp is not None:
        dist.all_reduce(total, group=groups.mesh.pp.get_group())
    return float(total)
