"""Mistral 7B and its successors of the same architecture."""

from __future__ import annotations

from archon_lora.models.spec import ModelSpec

from .config import MistralConfig
from .model import MistralModel
from .parallelize import parallelize
from .state_dict_adapter import MistralStateDictAdapter

SPEC = ModelSpec(
    model_type=MistralConfig.model_type,
    config_cls=MistralConfig,
    model_cls=MistralModel,
    state_dict_adapter_cls=MistralStateDictAdapter,
    parallelize_fn=parallelize,
)

__all__ = ["SPEC", "MistralConfig", "MistralModel", "MistralStateDictAdapter", "parallelize"]
