"""Qwen3, the dense models."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import Qwen3Config
from .model import Qwen3Model
from .parallelize import parallelize
from .state_dict_adapter import Qwen3StateDictAdapter

SPEC = ModelSpec(
    model_type=Qwen3Config.model_type,
    config_cls=Qwen3Config,
    model_cls=Qwen3Model,
    state_dict_adapter_cls=Qwen3StateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "Qwen3Config", "Qwen3Model", "Qwen3StateDictAdapter", "parallelize"]
