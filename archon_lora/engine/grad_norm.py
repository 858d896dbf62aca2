"""The global gradient norm over sharded parameters, the same number on every rank.

Three ways in which this goes wrong elsewhere are met here: a rank without a gradient that returns
early leaves the others in the collective for ever; ``abs().max()`` raises on the empty shard that a
rank-2 adapter has on ranks 2 and 3; and a maximum taken by the backend may lose a NaN. So every
rank always takes part in exactly one all-gather of a few numbers, and reduces them itself, in rank
order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate


class _Local(NamedTuple):
    """What one rank contributes (float64 sums of squares, or largest magnitudes)."""

    sharded: float
    replicated: float


@torch.no_grad()
def clip_grad_norm(
    params: Iterable[nn.Parameter],
    max_norm: float | None,
    *,
    norm_type: float = 2.0,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Measure the norm of all gradients, and scale them down where it is above ``max_norm``.

    Every element of a DTensor counts once, however many ranks hold a copy of it. A plain tensor
    is taken for a replica: equal on every rank that has its gradient, and counted once. A rank
    may have no parameters, no gradients or only empty shards; it still must call.

    Args:
        params: parameters whose ``.grad`` (may be None) is measured and scaled in place.
        max_norm: largest norm allowed, or None to measure only.
        norm_type: 2, or ``math.inf`` for the largest magnitude.
        group: ranks over which to reduce; None is the default group, or this process alone where
            no process group exists.

    Returns:
        The norm before clipping, bit-identical on every rank. NaN or infinity if any rank has such
        a gradient; then nothing is scaled.

    Raises:
        ValueError: another norm, or a ``max_norm`` that is not above zero.
        TypeError: a gradient with a partial placement (an unreduced sum has no norm yet).
    """
    if norm_type not in (2, math.inf):
        msg = f"norm_type must be 2 or inf, got {norm_type!r}"
        raise ValueError(msg)
    if max_norm is not None and not max_norm > 0:
        msg = f"max_norm must be > 0, or None to measure only, got {max_norm!r}"
        raise ValueError(msg)
    owned: list[Tensor] = []  # this rank answers for these elements
    copies: list[Tensor] = []  # another rank counts these, but they are scaled here all the same
    plain: list[Tensor] = []
    device: torch.device | None = None
    for param in params:
        device = param.device
        grad = param.grad
        if grad is None:
            continue
        if isinstance(grad, DTensor):
            (owned if _counts_here(grad) else copies).append(grad.to_local())
        else:
            plain.append(grad)
    local = _Local(_combine(owned, norm_type), _combine(plain, norm_type))
    norm = _reduce(_exchange(local, device, group), norm_type)
    if max_norm is not None and math.isfinite(norm) and norm > max_norm:
        # The same small term as torch.nn.utils uses, so that both clip alike.
        factor = max_norm / (norm + 1e-6)
        for grad in (*owned, *copies, *plain):
            grad.mul_(factor)
    return norm


def _counts_here(grad: DTensor) -> bool:
    """Whether this rank is the first in every mesh dimension that holds copies."""
    coordinate = grad.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    for index, placement in zip(coordinate, grad.placements, strict=True):
        if isinstance(placement, Partial):
            msg = f"gradient has the partial placement {placement}; reduce it before its norm"
            raise TypeError(msg)
        if isinstance(placement, Replicate) and index != 0:
            return False
    return True


def _combine(grads: list[Tensor], norm_type: float) -> float:
    """Sum of squares, or largest magnitude, over the elements of local tensors."""
    norms = [
        # fp32 keeps bf16 gradients from being summed in bf16.
        torch.linalg.vector_norm(g, norm_type, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in grads
        if g.numel() > 0
    ]
    if not norms:
        return 0.0
    stacked = torch.stack([n.to(device=norms[0].device, dtype=torch.float64) for n in norms])
    return float(stacked.square().sum() if norm_type == 2 else stacked.max())


def _exchange(
    local: _Local, device: torch.device | None, group: dist.ProcessGroup | None
) -> list[_Local]:
    """Everybody's contribution, by rank of the group."""
    if not dist.is_initialized():
        return [local]
    if device is None or device.type == "meta":
        cuda = "nccl" in dist.get_backend(group)
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    mine = torch.tensor(local, dtype=torch.float64, device=device)
    theirs = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(theirs, mine, group=group)
    return [_Local(*values) for values in torch.stack(theirs).tolist()]


def _reduce(parts: list[_Local], norm_type: float) -> float:
    numbers = [n for part in parts for n in part]
    if any(math.isnan(n) for n in numbers):
        return math.nan
    if norm_type != 2:
        return max(numbers)
    return math.sqrt(sum(p.sharded for p in parts) + max(p.replicated for p in parts))
