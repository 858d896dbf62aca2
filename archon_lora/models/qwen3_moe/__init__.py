"""Qwen3-MoE: Qwen3 with experts in the place of feed-forward blocks."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import Qwen3MoeConfig
from .model import Qwen3MoeModel
from .parallelize import parallelize
from .state_dict_adapter import Qwen3MoeStateDictAdapter

SPEC = ModelSpec(
    model_type=Qwen3MoeConfig.model_type,
    config_cls=Qwen3MoeConfig,
    model_cls=Qwen3MoeModel,
    state_dict_adapter_cls=Qwen3MoeStateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "Qwen3MoeConfig", "Qwen3MoeModel", "Qwen3MoeStateDictAdapter", "parallelize"]
