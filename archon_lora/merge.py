"""Merging for export: in fp32 and out of place, so that the base never changes by a bit.

Merging bf16 weights in place would lose most of the update to rounding, and taking it out again
would not restore the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .names import DEFAULT_ADAPTER, canonical_modules
from .placement import reshard


@runtime_checkable
class Mergeable(Protocol):
    """A module that can say what its weight would be with the adapter folded in."""

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that the module holds."""
        ...

    def merged_weight(self, adapter: str = DEFAULT_ADAPTER) -> Tensor:
        """Base plus that adapter's update, a new fp32 tensor."""
        ...


@runtime_checkable
class MergeableStacks(Protocol):
    """A module of stacked experts that can say what its stacks would be with adapters folded in."""

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that the module holds."""
        ...

    def merged_stacks(self, adapter: str = DEFAULT_ADAPTER) -> Iterator[tuple[str, Tensor]]:
        """Local name of each stack that it is for, and base plus update as a new fp32 tensor."""
        ...


@torch.no_grad()
def merge_factors(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``W + scaling * B A`` in fp32.

    Sharded tensors are gathered first: all ranks of their mesh must call.

    Args:
        weight: base, ``(out, in)``, or a stack of them, ``(E, out, in)``; any floating dtype; not
            changed.
        a: ``(r, in)``, or ``(E, r, in)``.
        b: ``(out, r)``, or ``(E, out, r)``.
        scaling: factor on the product.

    Returns:
        A new fp32 tensor of the weight's shape on its device.
    """
    base, down, up = (whole_tensor(t).float() for t in (weight, a, b))
    product = torch.addmm if base.dim() == 2 else torch.baddbmm
    return product(base, up, down, alpha=scaling)


def iter_merged_weights(
    model: nn.Module, *, adapter: str = DEFAULT_ADAPTER
) -> Iterator[tuple[str, Tensor]]:
    """The merged weight of every layer, and stack of experts, that an adapter is for, one by one.

    On sharded models this is collective: every rank must run the iterator to its end. One whole
    layer is held at a time, not the model.

    Args:
        model: a model with adapters, wrapped or not.
        adapter: the one that is folded in.

    Yields:
        Pairs (canonical FQN of the weight or stack, fp32 tensor), in the order of the modules.
    """
    reshard(model)
    for name, module in canonical_modules(model):
        if isinstance(module, Mergeable) and adapter in module.adapter_names():
            yield (f"{name}.weight" if name else "weight"), module.merged_weight(adapter)
        elif isinstance(module, MergeableStacks) and adapter in module.adapter_names():
            for stack, merged in module.merged_stacks(adapter):
                yield (f"{name}.{stack}" if name else stack), merged


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered if it is sharded (collective over its mesh), without its history."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()
