"""Bytes that a forward keeps for its backward: what activation memory is made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def kept_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that autograd keeps of a forward, the module's own not counted.

    Deterministic: the graph is asked, not the allocator. A storage counts once, whole, however
    many views of it are kept.

    Args:
        module: whose parameters and buffers are there anyway.
        forward: computes with gradients.
    """
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # the tensors, so that no storage is freed and its place reused

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until counted, and with it what its graph holds
    total = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in own)
    del result
    return total
