"""The state that is saved: an adapter of real shapes, with AdamW's moments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckpt import AdapterExport, TensorRule, TrainState


@dataclass(frozen=True)
class Shapes:
    """Sizes of a Qwen2 model and the adapter's rank."""

    layers: int
    hidden: int
    kv: int
    intermediate: int
    rank: int

    def modules(self) -> Iterator[tuple[str, int, int]]:
        """(path, input features, output features) of every linear that has an adapter."""
        h, k, i = self.hidden, self.kv, self.intermediate
        linears = {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (h, k),
            "self_attn.v_proj": (h, k),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (h, i),
            "mlp.up_proj": (h, i),
            "mlp.down_proj": (i, h),
        }
        for layer in range(self.layers):
            for name, (inputs, outputs) in linears.items():
                yield f"layers.{layer}.{name}", inputs, outputs


@dataclass(frozen=True)
class Uniform:
    """A state of a given size, in a given number of equal tensors (for the growth curves).

    A parameter under AdamW is four tensors: itself, two moments and a step counter.
    """

    nbytes: int
    tensors: int
    rank: int = 16

    def modules(self) -> Iterator[tuple[str, int, int]]:
        """As :meth:`Shapes.modules`."""
        pairs = max(1, self.tensors // 8)
        features = max(1, self.nbytes // (pairs * 2 * self.rank * 3 * 4))
        for number in range(pairs):
            yield f"layers.{number}.proj", features, features


Workload = Shapes | Uniform

WORKLOADS: dict[str, Workload] = {
    "qwen2-7b-r16": Shapes(layers=28, hidden=3584, kv=512, intermediate=18944, rank=16),
    "qwen2-0.5b-r16": Shapes(layers=24, hidden=896, kv=128, intermediate=4864, rank=16),
    "tiny": Shapes(layers=1, hidden=64, kv=16, intermediate=128, rank=4),
}


def build_model(workload: Workload, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Adapter parameters alone, sharded by FSDP2 over all ranks if there are several."""
    model = nn.Module()
    for path, inputs, outputs in workload.modules():
        parent = model
        for part in path.split("."):
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.lora_a = nn.Linear(inputs, workload.rank, bias=False, dtype=dtype)
        parent.lora_b = nn.Linear(workload.rank, outputs, bias=False, dtype=dtype)
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def build(workload: Workload) -> tuple[nn.Module, torch.optim.AdamW]:
    """The model in fp32 and an AdamW whose moments exist already."""
    model = build_model(workload)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer


def export(workload: Workload) -> AdapterExport:
    """How the model's parameters become a PEFT adapter."""
    rules, targets = [], set()
    for path, _inputs, _outputs in workload.modules():
        targets.add(path.rpartition(".")[2])
        for ours, theirs in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            key = f"base_model.model.model.{path}.{theirs}.weight"
            rules.append(TensorRule(source=f"{path}.{ours}.weight", key=key))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "benchmark",
        "r": workload.rank,
        "lora_alpha": workload.rank,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    return AdapterExport(peft_config=config, rules=tuple(rules))


def train_state(workload: Workload) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """The state as the manager takes it, and its tensors as the others do."""
    model, optimizer = build(workload)
    state = TrainState(model, optimizer, export=export(workload))
    return state, state_dict(model, optimizer)


def state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of the state under one flat name, as the peers' savers take it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        tensors[f"model.{name}"] = param.detach()
        for key, value in optimizer.state[param].items():
            tensors[f"optim.{name}.{key}"] = value
    return tensors
