"""Gemma 2."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import Gemma2Config
from .model import Gemma2Model
from .parallelize import parallelize
from .state_dict_adapter import Gemma2StateDictAdapter

SPEC = ModelSpec(
    model_type=Gemma2Config.model_type,
    config_cls=Gemma2Config,
    model_cls=Gemma2Model,
    state_dict_adapter_cls=Gemma2StateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "Gemma2Config", "Gemma2Model", "Gemma2StateDictAdapter", "parallelize"]
