"""Where a rank's part of a parameter lies, and how whole values get into it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from .errors import AdapterMismatch


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


def reshard(model: nn.Module) -> None:
    """Make sure that the parameters of FSDP2 modules are their shards.

    After a forward without a backward, e.g. one of the reference model, FSDP2 leaves the root's
    parameters gathered and cast to the computing dtype. Read then, fp32 adapters would come out
    rounded; written then, the values would be lost. Local and cheap; not for use during a forward.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
