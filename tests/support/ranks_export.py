"""What each rank runs in the tests of exports from sharded adapters."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from archon_lora import LoRAConfig, apply_lora, get_adapter_params
from ckpt import AdapterExport, CheckpointManager, TensorRule, TrainState
from support import ranks_lora
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


EXPERTS = 5
"""Do not divide by the ranks: with expert parallelism one has more of them, or none."""

EP_KINDS = {"ep": (Shard(0),), "ep+tp": (Shard(0), Shard(1))}


def stacked_experts() -> tuple[dict[str, torch.Tensor], AdapterExport]:
    """Factors of all experts stacked along the first dimension, and an export expert by expert."""
    generator = torch.Generator().manual_seed(7)
    tensors = {
        "experts.up.lora_a.weight": torch.randn((EXPERTS, 3, 12), generator=generator),
        "experts.up.lora_b.weight": torch.randn((EXPERTS, 10, 3), generator=generator),
    }
    rules = [
        TensorRule(
            f"experts.up.lora_{side}.weight",
            f"base_model.model.model.experts.{index}.up_proj.lora_{side.upper()}.weight",
            scale=1.7 if side == "b" else 1.0,
            pad_dim=0 if side == "a" else 1,
            pad_to=4,
            index=index,
        )
        for index in range(EXPERTS)
        for side in "ab"
    ]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    return tensors, AdapterExport({**config, "bias": "none"}, tuple(rules))


def save_experts(rank: int, world: int, root: str) -> list[int]:
    """Save stacked experts, once for every layout; how many experts this rank had in each."""
    held = []
    for kind, places in EP_KINDS.items():
        shape = (world,) if len(places) == 1 else (world // 2, 2)
        mesh = init_device_mesh("cpu", shape)
        tensors, export = stacked_experts()
        a, b = (distribute_tensor(tensor, mesh, places) for tensor in tensors.values())
        held.append(a.to_local().shape[0])
        model = nn.Module()
        _attach(model, "experts.up", Adapter(a, b))
        with CheckpointManager(f"{root}/{kind}") as manager:
            manager.save(3, TrainState(model, export=export)).wait(60)
    return held


def _attach(model: nn.Module, name: str, module: nn.Module) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in model._modules:
            model.add_module(parent, nn.Module())
        model = model.get_submodule(parent)
    model.add_module(last, module)


TP_KINDS = ("tp", "tp+fsdp")
"""Layouts of a whole model over four ranks; ten rows do not divide by four."""

CONFIG = LoRAConfig(rank=6, alpha=9.0, use_rslora=True, rank_pattern={"up": 3})
"""Of two ranks and with a scaling, so that the export pads and folds."""


def save_model(rank: int, world: int, root: str, kind: str) -> list[str]:
    """Save a model with LoRA, whole or under tensor parallelism; the placements it had.

    Column-wise layers have A whole and B split on out; row-wise layers A split on in and B whole.
    With ``tp+fsdp``, FSDP2 then splits each part once more over the other mesh dimension.
    """
    net = ranks_lora.Net()
    apply_lora(net, CONFIG)
    if kind == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    elif kind == "tp+fsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    for number, layer in enumerate(net.layers):
        for name, places in (
            ("up", (Replicate(), Shard(0))),
            ("down", (Shard(1), Replicate())),
        ):
            module = layer.get_submodule(name)
            for factor, place in zip((module.lora_a, module.lora_b), places, strict=True):
                whole = _value(f"{number}.{name}.{place}", factor.weight.shape)
                if kind != "plain":
                    whole = distribute_tensor(whole, mesh["tp"], [place])
                factor.weight = nn.Parameter(whole)
            if kind == "tp+fsdp":
                split = distribute_tensor(module.weight.detach(), mesh["tp"], [Shard(0)])
                module.weight = nn.Parameter(split, requires_grad=False)
                if module.bias is not None:
                    split = distribute_tensor(module.bias.detach(), mesh["tp"], [Shard(0)])
                    module.bias = nn.Parameter(split, requires_grad=False)
        if kind == "tp+fsdp":
            fully_shard(layer, mesh=mesh["dp"])
    with CheckpointManager(root) as manager:
        manager.save(3, TrainState(net)).wait(60)
    return sorted({str(getattr(p, "placements", None)) for p in get_adapter_params(net).values()})


def save_models(rank: int, world: int, root: str) -> dict[str, list[str]]:
    """Save the model once for every layout, each to a root of its own; the placements."""
    return {kind: save_model(rank, world, f"{root}/{kind}", kind) for kind in TP_KINDS}


def _value(name: str, shape: torch.Size) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator)
