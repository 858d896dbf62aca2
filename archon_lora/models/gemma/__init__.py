"""Gemma, the first generation."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import GemmaConfig
from .model import GemmaModel
from .parallelize import parallelize
from .state_dict_adapter import GemmaStateDictAdapter

SPEC = ModelSpec(
    model_type=GemmaConfig.model_type,
    config_cls=GemmaConfig,
    model_cls=GemmaModel,
    state_dict_adapter_cls=GemmaStateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "GemmaConfig", "GemmaModel", "GemmaStateDictAdapter", "parallelize"]
