"""A tiny Qwen3-MoE directory, and training steps on any layout of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from archon_lora import (
    LoRAConfig,
    add_adapter,
    apply_lora,
    copy_adapter,
    get_adapter_params,
    initialise_adapters,
)
from archon_lora.engine import OptimizerConfig
from archon_lora.engine.grad_norm import clip_grad_norm
from archon_lora.engine.schedule import build_optimizer
from archon_lora.models import load_hf_weights
from archon_lora.models.parallel_dims import ParallelDims, build_mesh
from archon_lora.models.qwen3_moe import SPEC, Qwen3MoeConfig, Qwen3MoeModel
from archon_lora.models.qwen3_moe.state_dict_adapter import Qwen3MoeStateDictAdapter
from archon_lora.names import canonical_fqn
from ckpt import TrainState

VOCAB, ROWS, TOKENS = 96, 12, 5
EXPERTS = 6
"""Three for each of two ranks: over two more they are sharded unevenly."""

CONFIG = Qwen3MoeConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=EXPERTS,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    norm_topk_prob=True,
)
LORA = LoRAConfig(rank=4, alpha=8, rank_pattern={"down_proj": 2})


def write_moe(directory: Path) -> Path:
    """``config.json`` and random weights, expert by expert as the Hub has them."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {k: v for k, v in dataclasses.asdict(CONFIG).items() if not isinstance(v, tuple)}
    values |= {"model_type": "qwen3_moe", "hidden_act": "silu", "mlp_only_layers": []}
    (directory / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = Qwen3MoeModel(CONFIG)
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape, generator=generator)
        weights[name] = 1.0 + 0.1 * value if "norm" in name else 0.2 * value
    hf = Qwen3MoeStateDictAdapter(CONFIG).to_hf(weights)
    tensors = {name: tensor.contiguous() for name, tensor in hf.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


class Run:
    """One model in training; a layout of one rank has neither meshes nor FSDP."""

    def __init__(self, directory: str, dims: ParallelDims | None, lora: LoRAConfig = LORA) -> None:
        adapter = Qwen3MoeStateDictAdapter(CONFIG)
        with torch.device("meta"):
            self.model: nn.Module = Qwen3MoeModel(CONFIG)
        apply_lora(self.model, lora, name_map=adapter.module_to_hf)
        add_adapter(self.model, "reference", lora, trainable=False)
        self.rank, self.dp = 0, 1
        if dims is not None:
            layout = build_mesh(dims, "cpu")
            SPEC.parallelize_fn(self.model, layout, activation_checkpointing=True)
            self.rank, self.dp = layout.dp_rank, layout.dims.dp
        self.model.to_empty(device="cpu")
        self.loaded = load_hf_weights(self.model, adapter, directory)
        initialise_adapters(self.model)
        self.optimizer = build_optimizer(self.parameters(), OptimizerConfig(lr=1e-2))
        self.steps = 0

    def step(self, tokens: Tensor | None = None) -> tuple[float, float]:
        """Loss over all rows and gradient norm; the rows are shared out over data ranks."""
        if tokens is None:
            generator = torch.Generator().manual_seed(100 + self.steps)
            tokens = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=generator)
        self.steps += 1
        self.optimizer.zero_grad()
        mine = tokens.tensor_split(self.dp)[self.rank]
        logits = self.model(mine)[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), mine[:, 1:].flatten())
        loss.backward()
        norm = clip_grad_norm(self.parameters(), 0.5)
        self.optimizer.step()
        total = loss.detach().clone()
        if self.dp > 1:
            dist.all_reduce(total)
            total /= dist.get_world_size()
        return float(total), norm

    def parameters(self) -> list[nn.Parameter]:
        return list(get_adapter_params(self.model).values())

    def keep_reference(self) -> None:
        copy_adapter(self.model, "default", "reference")

    def state(self) -> TrainState:
        return TrainState(self.model, self.optimizer)

    def adapter(self) -> dict[str, Tensor]:
        return {name: whole(p.detach()) for name, p in get_adapter_params(self.model).items()}

    def gradients(self) -> dict[str, Tensor]:
        found = get_adapter_params(self.model)
        return {name: whole(p.grad) for name, p in found.items() if p.grad is not None}

    def digest(self) -> dict[str, str]:
        """SHA-256 of every adapter and optimizer tensor, by name."""
        return {
            name: hashlib.sha256(whole(tensor.detach()).numpy().tobytes()).hexdigest()
            for name, tensor in self.state().live().tensors.items()
        }

    def placements(self) -> dict[str, Any]:
        return {
            canonical_fqn(name): (tuple(p.to_local().shape), str(p.placements))
            for name, p in self.model.named_parameters()
            if isinstance(p, DTensor)
        }


def whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().contiguous()
