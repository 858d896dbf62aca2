"""Where the parts of an adapter lie when a model is sharded."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard

from .errors import LoRAConfigError
from .linear import LoRALinear

ShardPlacementFn = Callable[[nn.Parameter], Shard | None]


def adapter_shard_placement(model: nn.Module, *, shards: int | None = None) -> ShardPlacementFn:
    """A ``shard_placement_fn`` for ``fully_shard`` that splits adapters where they are long.

    FSDP2 splits dimension 0 by default, which for A is the rank: with a rank below the number of
    shards, some ranks would hold nothing. So A is split on its input dimension when that divides
    evenly (FSDP2 accepts uneven shards on dimension 0 only), else on dimension 0; B is split on
    its output dimension, which is dimension 0. Everything else is left to FSDP2.

    Args:
        model: a model with adapters, before it is sharded; the function may be passed to every
            ``fully_shard`` call on its parts.
        shards: ranks that one parameter is split over; by default the size of the default
            process group, a multiple of the shard dimension of any mesh in it.

    Returns:
        The function.

    Raises:
        LoRAConfigError: ``shards`` is below 1.
    """
    if shards is None:
        shards = dist.get_world_size() if dist.is_initialized() else 1
    if shards < 1:
        msg = f"shards must be >= 1, got {shards}"
        raise LoRAConfigError(msg)
    # By identity, without keeping the whole tensors alive once FSDP2 has replaced them.
    split_on_input: dict[int, weakref.ref[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.lora_a.weight.shape[1] % shards == 0:
            weight = module.lora_a.get_parameter("weight")
            split_on_input[id(weight)] = weakref.ref(weight)

    def place(parameter: nn.Parameter) -> Shard | None:
        known = split_on_input.get(id(parameter))
        return Shard(1) if known is not None and known() is parameter else None

    return place
