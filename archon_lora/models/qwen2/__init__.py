"""Qwen2 (and Qwen2.5, which differs in values only)."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import Qwen2Config
from .model import Qwen2Model
from .parallelize import parallelize
from .state_dict_adapter import Qwen2StateDictAdapter

SPEC = ModelSpec(
    model_type=Qwen2Config.model_type,
    config_cls=Qwen2Config,
    model_cls=Qwen2Model,
    state_dict_adapter_cls=Qwen2StateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "Qwen2Config", "Qwen2Model", "Qwen2StateDictAdapter", "parallelize"]
