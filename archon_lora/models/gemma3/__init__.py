"""Gemma 3, the text models."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import Gemma3Config
from .model import Gemma3Model
from .parallelize import parallelize
from .state_dict_adapter import Gemma3StateDictAdapter

SPEC = ModelSpec(
    model_type=Gemma3Config.model_type,
    config_cls=Gemma3Config,
    model_cls=Gemma3Model,
    state_dict_adapter_cls=Gemma3StateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "Gemma3Config", "Gemma3Model", "Gemma3StateDictAdapter", "parallelize"]
