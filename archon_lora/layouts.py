"""Tensors and parameters brought from one layout over ranks to another.

*Whole* is ``Replicate()``; *by sequence* is ``Shard(1)`` of ``(B, S, D)``; *by feature* is
``Shard(-1)``. Every step, forward and backward, is a DTensor's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from .errors import ParallelConfigError

WHOLE = Replicate()
BY_SEQUENCE = Shard(1)
BY_FEATURE = Shard(-1)


def relayout(
    x: Tensor,
    mesh: DeviceMesh,
    source: Placement,
    target: Placement,
    *,
    grad: Placement | None = None,
    size: int | None = None,
) -> Tensor:
    """Bring a plain tensor from one layout over a mesh dimension to another; differentiable.

    Args:
        x: this rank's part under ``source``.
        mesh: one dimension.
        source: the layout that ``x`` has; its gradient gets it too (whole for partial sums).
        target: the layout wanted.
        grad: the layout that the gradient of the result will have; by default ``target``.
        size: length of the whole in the last dimension, where ``source`` splits that unevenly.

    Returns:
        This rank's part under ``target``.
    """
    source, target, grad = (_positive(p, x.ndim) for p in (source, target, grad or target))
    options: dict[str, Any] = {}
    if size is not None:
        shape = torch.Size((*x.shape[:-1], size))
        options = {"shape": shape, "stride": torch.empty(shape, device="meta").stride()}
    whole = DTensor.from_local(x, mesh, [source], run_check=False, **options)
    return whole.redistribute(placements=[target]).to_local(grad_placements=[grad])


class _NoView(torch.autograd.Function):
    """The identity, whose result does not pass for a view.

    DTensor hands out views of tensors that nobody else sees. FSDP2 warns of a view that leaves its
    module, since a change in place would lose its hook; a copy of all logits would be dear.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def gather_features(x: Tensor, mesh: DeviceMesh, size: int) -> Tensor:
    """The whole last dimension of a tensor that is split in it.

    Args:
        x: this rank's part.
        mesh: one dimension.
        size: length of the whole.
    """
    whole = relayout(x, mesh, BY_FEATURE, WHOLE, size=size)
    own: Tensor = _NoView.apply(whole)  # type: ignore[no-untyped-call]  # torch's
    return own


def distribute_parameters(
    module: nn.Module, mesh: DeviceMesh, placements: Mapping[str, Placement]
) -> None:
    """Turn parameters into DTensors, in place; each rank keeps its part of its own values.

    Args:
        module: holds the parameters, itself or in submodules.
        mesh: one dimension.
        placements: by local name.

    Raises:
        ParallelConfigError: a parameter that is a DTensor already, or none of plain numbers.
    """
    for name, placement in placements.items():
        owner, local = owner_of(module, name)
        old = owner.get_parameter(local)
        if isinstance(old, DTensor):
            msg = f"{name} of a {type(module).__name__} is sharded already; styles come first"
            raise ParallelConfigError(msg)
        if type(old) is not nn.Parameter:
            msg = (
                f"{name} of a {type(module).__name__} is a {type(old).__name__}: weights of "
                "another kind, such as quantised ones, are not split over ranks; set tp to 1"
            )
            raise ParallelConfigError(msg)
        # No source rank: all ranks have the same values, or none yet.
        split = distribute_tensor(old.detach(), mesh, [placement], src_data_rank=None)
        owner.register_parameter(local, nn.Parameter(split, requires_grad=old.requires_grad))


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds a parameter, and its name there."""
    path, _, local = name.rpartition(".")
    return module.get_submodule(path), local


def _positive(placement: Placement, ndim: int) -> Placement:
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + ndim)
    return placement
