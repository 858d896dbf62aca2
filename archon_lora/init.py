"""Initial values of adapters: the same bits for the same seed and name, on any topology.

A value is drawn on the host for the whole (global) tensor and each rank copies its slice, so
neither the fan nor the numbers depend on how the tensor is sharded, and no broadcast is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .errors import AdapterMismatch

InitKind = Literal["kaiming", "gaussian", "zeros"]


def initial_value(seed: int, fqn: str, global_shape: Sequence[int], kind: str) -> Tensor:
    """Draw the initial value of one whole parameter.

    Args:
        seed: the run's seed.
        fqn: canonical name of the parameter.
        global_shape: shape of the unsharded parameter; A is ``(..., r, in)``.
        kind: ``"kaiming"``: U(-b, b) with b = 1/sqrt(in), which is what ``kaiming_uniform_`` with
            a = sqrt(5) gives for A (PEFT, torchtune, nn.Linear); ``"gaussian"``: mean 0 and
            standard deviation 1/r (PEFT); ``"zeros"``.

    Returns:
        fp32 tensor on the CPU.

    Raises:
        ValueError: an unknown kind.
    """
    shape = tuple(global_shape)
    if kind == "zeros":
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    # manual_seed takes 64 bits; torch reads them as signed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if kind == "gaussian":
        # Drawn in fp64: the fp32 kernel for normal values differs between instruction sets.
        drawn = torch.empty(shape, dtype=torch.float64).normal_(generator=generator)
        return (drawn / shape[-2]).float()
    msg = f"init must be 'kaiming', 'gaussian' or 'zeros', got {kind!r}"
    raise ValueError(msg)


def local_slice(parameter: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a parameter lies in the global tensor.

    Args:
        parameter: a plain tensor (its part is all of it) or a DTensor.

    Returns:
        One slice a dimension; empty slices on a rank that holds nothing.

    Raises:
        AdapterMismatch: the local part is not one block of the global tensor.
    """
    if not isinstance(parameter, DTensor):
        return tuple(slice(0, size) for size in parameter.shape)
    # The protocol by which torch's own checkpoints ask a tensor for its offsets. It needs no
    # communication and knows every placement (strided and uneven ones too), which
    # distribute_tensor() does not accept.
    chunks = parameter.__create_chunk_list__()  # type: ignore[no-untyped-call]
    local = tuple(parameter.to_local().shape)
    if len(chunks) != 1 or tuple(chunks[0].sizes) != local:
        msg = (
            f"a shard must be one block of the global tensor, got {len(chunks)} chunks for a "
            f"local shape {local} under placements {parameter.placements}"
        )
        raise AdapterMismatch(msg)
    sizes = zip(chunks[0].offsets, chunks[0].sizes, strict=True)
    return tuple(slice(offset, offset + size) for offset, size in sizes)


@torch.no_grad()
def copy_global_(parameter: Tensor, value: Tensor) -> None:
    """Copy this rank's slice of a global value into a parameter, casting to its dtype.

    Args:
        parameter: plain tensor or DTensor, of the value's global shape.
        value: the whole tensor, on any device.

    Raises:
        AdapterMismatch: the shapes differ.
    """
    if tuple(parameter.shape) != tuple(value.shape):
        msg = f"a parameter of shape {tuple(parameter.shape)} cannot take {tuple(value.shape)}"
        raise AdapterMismatch(msg)
    copy_local_(parameter, value[local_slice(parameter)])


@torch.no_grad()
def copy_local_(parameter: Tensor, part: Tensor) -> None:
    """Copy values of this rank's slice into its local tensor, casting to its dtype."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    local.copy_(part)
