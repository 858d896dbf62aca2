"""Tiny models of every family, written by transformers itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "rope_theta": 1e4,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-biased": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": LINEAR,
    },
    "llama-llama3": {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "mistral-window": {"model_type": "mistral", "head_dim": 16, "sliding_window": 5},
    "mistral-everything": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_parameters": YARN,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied-biased": {
        "model_type": "qwen3",
        "head_dim": 8,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "rope_parameters": YARN,
    },
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen3-moe-mixed": {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "gemma": {"model_type": "gemma", "head_dim": 16, "num_key_value_heads": 1},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        # Low enough to bend the scores and logits of so small a model.
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma2-uncapped": {
        "model_type": "gemma2",
        "head_dim": 16,
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 3,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "attention_bias": True,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 5,
        "query_pre_attn_scalar": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
    },
}


def write_family(directory: Path, case: str, *, seed: int = 3, **changes: Any) -> Path:
    """Write a case's model; every weight random, norms and biases too."""
    values = {**SIZES, **CASES[case], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _draw(model)
    model.save_pretrained(directory)
    return directory


def composite_gemma3() -> nn.Module:
    """A tiny Gemma 3 of text and images, with random weights."""
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 8,
        "patch_size": 4,
    }
    text = {**SIZES, **CASES["gemma3"]}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=1,
        image_token_index=VOCAB - 1,
        boi_token_index=VOCAB - 2,
        eoi_token_index=VOCAB - 3,
    )
    torch.manual_seed(3)
    model = Gemma3ForConditionalGeneration(config).eval()
    _draw(model)
    return model


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """Every weight random, norms and biases too."""
    for name, parameter in model.named_parameters():
        value = torch.randn(parameter.shape)
        if "norm" in name:
            parameter.add_(0.2 * value)
        else:
            parameter.copy_(0.15 * value)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: dict[str, Sequence[str]] = {
    "qwen3-moe-mixed": ATTENTION,
}
"""What is adapted where it is not every linear layer."""

_BOTH = ("gate_proj", "up_proj")
PATTERNS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {
        "rank_pattern": dict.fromkeys(_BOTH, 8),
        "alpha_pattern": dict.fromkeys(_BOTH, 24),
    }
}
"""PEFT with transformers 5 adapts gate and up projections together, with twice the rank."""


def fused_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of single experts as transformers holds them in memory: stacked, gate over up."""
    rest = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    single = [name.split(".experts.") for name in tensors if ".experts." in name]
    for layer in {layer for layer, _ in single}:
        count = len({name.split(".")[0] for where, name in single if where == layer})

        def stack(kind: str, layer: str = layer, count: int = count) -> torch.Tensor:
            names = [f"{layer}.experts.{expert}.{kind}.weight" for expert in range(count)]
            return torch.stack([tensors[name] for name in names])

        rest[f"{layer}.experts.gate_up_proj"] = torch.cat(
            (stack("gate_proj"), stack("up_proj")), dim=1
        )
        rest[f"{layer}.experts.down_proj"] = stack("down_proj")
    return rest
