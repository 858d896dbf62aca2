"""AReaL's plans of tensor parallelism, for layers with adapters.

Its families build their plans from torch's ``ColwiseParallel`` and ``RowwiseParallel``, which place
all parameters of a layer alike and fail on a layer with factors. While AReaL parallelises a model,
the two names stand for styles here that know factors; everything else of a plan is torch's.

Of a column-parallel layer A is whole and B is split like the base's output; of a row-parallel one
A is split like the base's input and B is whole, so that its partial sums join the base's before
their one reduction. The layer then computes with DTensors, as the base does under torch's styles.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from archon_lora.adapter import adapter_modules, get_adapter_params
from archon_lora.errors import LoRAConfigError
from archon_lora.layouts import distribute_parameters
from archon_lora.linear import LoRALinear
from archon_lora.tensor_parallel import SplitsFactors

_TP: Final = "tp"


class _Column(ColwiseParallel):
    """As torch's, and the factors of a layer that has some."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _partition(super(), name, module, device_mesh, weight=Shard(0), bias=Shard(0))


class _Row(RowwiseParallel):
    """As torch's, and the factors of a layer that has some."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _partition(super(), name, module, device_mesh, weight=Shard(1), bias=Replicate())


_STYLES: Final[Mapping[str, tuple[type[ParallelStyle], type[ParallelStyle]]]] = {
    "ColwiseParallel": (ColwiseParallel, _Column),
    "RowwiseParallel": (RowwiseParallel, _Row),
}
"""By name: torch's style, and the one that stands for it."""


def _partition(
    stock: Any,
    name: str,
    module: nn.Module,
    mesh: DeviceMesh,
    *,
    weight: Placement,
    bias: Placement,
) -> None:
    """Place a layer's parameters; torch calls this for the layer and for each child."""
    if name:
        return  # a factor: placed with its layer
    if not isinstance(module, SplitsFactors):
        stock._partition_linear_fn(name, module, mesh)
        return
    placements: dict[str, Placement] = {"weight": weight}
    if module._parameters.get("bias") is not None:
        placements["bias"] = bias
    column = weight == Shard(0)
    for a, b in module.split_factors():
        placements |= {
            a: Replicate() if column else Shard(1),
            b: Shard(0) if column else Replicate(),
        }
    distribute_parameters(module, mesh, placements)


@contextmanager
def factors_in_plans(parallelize_fn: Callable[..., Any]) -> Iterator[None]:
    """Within the block the plans that AReaL builds place factors as well.

    Args:
        parallelize_fn: the family's; the modules of its package are looked at.

    Raises:
        LoRAConfigError: none of them knows torch's styles by their names.
    """
    package = inspect.unwrap(parallelize_fn).__module__.partition(".")[0]
    kept: list[tuple[ModuleType, str, type[ParallelStyle]]] = []
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != package or module is None:
            continue
        for name, (stock, ours) in _STYLES.items():
            if vars(module).get(name) is stock:
                kept.append((module, name, stock))
                setattr(module, name, ours)
    try:
        if not kept:
            msg = (
                f"no module of {package} has torch's ColwiseParallel, so its plan of tensor "
                "parallelism is not known here; use_lora with tp=1"
            )
            raise LoRAConfigError(msg)
        yield
    finally:
        for module, name, stock in kept:
            setattr(module, name, stock)


def freeze_base(model: nn.Module) -> None:
    """Let only adapters train: torch's ``SequenceParallel`` makes new parameters, which would."""
    own = {id(parameter) for parameter in get_adapter_params(model).values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in own)


def check_split(model: nn.Module) -> None:
    """Make sure that the plan reached every adapter.

    Raises:
        LoRAConfigError: names a layer that it left whole; its gradients would not be summed.
    """
    for name, module in adapter_modules(model):
        factors = module.lora_b.weight if isinstance(module, LoRALinear) else None
        names = factors.device_mesh.mesh_dim_names if isinstance(factors, DTensor) else None
        if names is None or _TP not in names:
            msg = (
                f"AReaL's plan of tensor parallelism does not split {name!r}, so an adapter there "
                "would train apart on each rank; leave it out of target_modules, or use tp=1"
            )
            raise LoRAConfigError(msg)
