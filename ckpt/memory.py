"""The memory of a CPU tensor as bytes, without a copy and without NumPy, which is no dependency."""

from __future__ import annotations

import ctypes

import torch


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor; they stay in memory while a view of them lives.

    Args:
        tensor: of any dtype and shape.

    Returns:
        A writable view of format ``B``.
    """
    size = tensor.numel() * tensor.element_size()
    array = (ctypes.c_char * size).from_address(tensor.data_ptr())
    # Every view keeps the array, but a bare address keeps nothing: without this a view that
    # outlives the tensor would read memory that is no longer the tensor's.
    array.owner = tensor  # type: ignore[attr-defined]  # for this alone
    return memoryview(array).cast("B")
