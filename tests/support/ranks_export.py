"""What each rank runs in the tests of exports from sharded adapters."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ckpt import CheckpointManager, TrainState
from support.steps import tiny_adapter

MODULES = ("layers.0.wq", "layers.0.wo", "layers.10.wq", "layers.2.wq")
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}


class Adapter(nn.Module):
    """The factors of one module under their names in a checkpoint."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.lora_a, self.lora_b = nn.Module(), nn.Module()
        self.lora_a.weight, self.lora_b.weight = nn.Parameter(a), nn.Parameter(b)


def save_sharded(rank: int, world: int, root: str) -> bool:
    """Save a small adapter as DTensors, once for every placement, each to a root of its own."""
    mesh = init_device_mesh("cpu", (world,))
    for name, placement in PLACEMENTS.items():
        # Rank 5 and 10 rows do not divide by 4.
        tensors, export = tiny_adapter(MODULES, rank=5, scale=1.7, optimizer=False)
        model = nn.Module()
        for module in MODULES:
            a, b = (
                distribute_tensor(tensors[f"model.{module}.lora_{side}.weight"], mesh, [placement])
                for side in "ab"
            )
            _attach(model, module, Adapter(a, b))
        with CheckpointManager(f"{root}/{name}") as manager:
            manager.save(3, TrainState(model, export=export)).wait(60)
    return True


def _attach(model: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in model._modules:
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    model.add_module(last, module)
