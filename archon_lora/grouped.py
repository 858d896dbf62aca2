"""One linear map for each group of rows: what stacked experts compute.

Shape suffixes: ``_RI`` and ``_RO`` rows sorted by group, with input or output features; E groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

_ALIGNMENT = 16
"""Bytes that the grouped product wants the strides of its operands to be a multiple of."""

_KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the rows of each group by the group's own matrix.

    Uses torch's grouped product where it takes the operands, and one product a group elsewhere;
    both give the same numbers on the CPU. A group without rows takes part: its matrix gets a
    gradient of zeros, not none, so that every rank reduces the same set of parameters.

    Args:
        x_RI: rows sorted by group, ``(rows, in)``, in the weight's dtype.
        weight_EOI: one matrix a group, ``(groups, out, in)``, a plain tensor.
        counts_E: rows of each group, int64, ``(groups,)``; they sum to ``rows``.

    Returns:
        ``(rows, out)`` in the weight's dtype.
    """
    if _takes_kernel(x_RI, weight_EOI):
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        product: Tensor = F.grouped_mm(x_RI, weight_EOI.transpose(-2, -1), offs=offsets_E)
        return product
    parts = torch.split(x_RI, counts_E.tolist())
    # unbind, not indexing: the gradient of an index is a whole stack of zeros for each group.
    pairs = zip(parts, weight_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(part, matrix) for part, matrix in pairs])


def local_stack(stack: Tensor) -> Tensor:
    """The groups that this rank computes: its part of a stack that is sharded between groups."""
    return stack.to_local() if isinstance(stack, DTensor) else stack


def _takes_kernel(x_RI: Tensor, weight_EOI: Tensor) -> bool:
    if x_RI.shape[0] == 0 or 0 in weight_EOI.shape or weight_EOI.dtype not in _KERNEL_DTYPES:
        return False
    on_gpu = weight_EOI.is_cuda and weight_EOI.dtype is torch.bfloat16
    if torch.compiler.is_compiling() and not on_gpu:
        return False  # what torch (2.13) runs elsewhere, its tracer refuses
    width = weight_EOI.element_size()
    return all(size * width % _ALIGNMENT == 0 for size in weight_EOI.shape[1:])
