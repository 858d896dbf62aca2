"""Tiny models of every family, written by transformers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
WINDOW = {"sliding_window": 5}

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
}


def write_family(directory: Path, case: str, *, seed: int = 3, **changes: Any) -> Path:
    """Write a case's model; every weight random, norms and biases too."""
    values = {**SIZES, **CASES[case], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape)
            if "norm" in name:
                parameter.add_(0.2 * value)
            else:
                parameter.copy_(0.15 * value)
    model.save_pretrained(directory)
    return directory
