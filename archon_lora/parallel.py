"""Where the parts of an adapter lie when a model is sharded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from .embedding import LoRAEmbedding
from .errors import LoRAConfigError, TargetError
from .linear import LoRALinear
from .tensor_parallel import ColumnParallel, RowParallel

ShardPlacementFn = Callable[[nn.Parameter], Shard | None]


class LoRAColwiseParallel(ColumnParallel):
    """For ``parallelize_module``: an adapted layer whose outputs are split over the mesh.

    The base's weight and bias and B are split on dimension 0, A is whole on every rank, and its
    gradient is summed over the mesh in backward. torch's own ``ColwiseParallel`` fails on such a
    layer. For arguments see :class:`archon_lora.tensor_parallel.ColumnParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return super()._apply(_adapted(module), device_mesh)


class LoRARowwiseParallel(RowParallel):
    """For ``parallelize_module``: an adapted layer whose inputs are split over the mesh.

    The base's weight and A are split on dimension 1, B and the bias are whole. The adapter's
    partial sums join the base's before the one reduction. For arguments see
    :class:`archon_lora.tensor_parallel.RowParallel`.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return super()._apply(_adapted(module), device_mesh)


def _adapted(module: nn.Module) -> LoRALinear:
    if not isinstance(module, LoRALinear):
        msg = (
            f"the style is for LoRALinear, got {type(module).__name__}: call apply_lora() before "
            "parallelize_module(), and use torch's styles for layers without an adapter"
        )
        raise TargetError(msg)
    return module


def _factors_a(module: nn.Module) -> Iterator[nn.Parameter]:
    """A of every adapter that a module holds."""
    if isinstance(module, LoRALinear):
        for name in module.adapter_names():
            yield module.adapter_of(name).lora_a.get_parameter("weight")
    elif isinstance(module, LoRAEmbedding):
        for name in module.adapter_names():
            yield module.adapter_of(name).lora_embedding_a


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
            process group, a multiple of the shard dimension of any mesh in it. Of a layer that
            tensor parallelism has split, what counts is this rank's part.

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
        for weight in _factors_a(module):
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            if local.shape[1] % shards == 0:
                split_on_input[id(weight)] = weakref.ref(weight)

    def place(parameter: nn.Parameter) -> Shard | None:
        known = split_on_input.get(id(parameter))
        return Shard(1) if known is not None and known() is parameter else None

    return place
