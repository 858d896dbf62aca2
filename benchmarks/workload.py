"""The state that is saved: an adapter of real shapes, with AdamW's moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Qwen2 model and the adapter's rank."""

    layers: int
    hidden: int
    kv: int
    intermediate: int
    rank: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(input, output) features of the seven linears of a layer."""
        h, k, i = self.hidden, self.kv, self.intermediate
        return {
            "wq": (h, h),
            "wk": (h, k),
            "wv": (h, k),
            "wo": (h, h),
            "w1": (h, i),
            "w3": (h, i),
            "w2": (i, h),
        }


WORKLOADS = {
    "qwen2-7b-r16": Shapes(layers=28, hidden=3584, kv=512, intermediate=18944, rank=16),
    "qwen2-0.5b-r16": Shapes(layers=24, hidden=896, kv=128, intermediate=4864, rank=16),
    "tiny": Shapes(layers=1, hidden=64, kv=16, intermediate=128, rank=4),
}


def build(shapes: Shapes) -> tuple[nn.Module, torch.optim.AdamW]:
    """Adapter parameters alone (fp32), sharded by FSDP2 over all ranks if there are several.

    Returns:
        The module and an AdamW whose moments exist already.
    """
    model = nn.Module()
    for layer in range(shapes.layers):
        block = nn.Module()
        for name, (inputs, outputs) in shapes.linears().items():
            pair = nn.Module()
            pair.lora_a = nn.Linear(inputs, shapes.rank, bias=False)
            pair.lora_b = nn.Linear(shapes.rank, outputs, bias=False)
            block.add_module(name, pair)
        model.add_module(f"layers_{layer}", block)
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the state under one flat name, as the peers' savers take it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        tensors[f"model.{name}"] = param.detach()
        for key, value in optimizer.state[param].items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors
