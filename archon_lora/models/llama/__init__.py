"""Llama 2 and 3 (3.1 to 3.3 with their stretched frequencies)."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import LlamaConfig
from .model import LlamaModel
from .parallelize import parallelize
from .state_dict_adapter import LlamaStateDictAdapter

SPEC = ModelSpec(
    model_type=LlamaConfig.model_type,
    config_cls=LlamaConfig,
    model_cls=LlamaModel,
    state_dict_adapter_cls=LlamaStateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "LlamaConfig", "LlamaModel", "LlamaStateDictAdapter", "parallelize"]
