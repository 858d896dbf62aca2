"""Archon models: architecture, names, sharding and loading from HuggingFace directories."""

from __future__ import annotations

from .base import BaseStateDictAdapter
from .cache import KVCache
from .loading import (
    LoadReport,
    base_fingerprint,
    load_hf_weights,
    load_pretrained,
    weights_fingerprint,
)
from .registry import get_model_spec, model_specs
from .spec import ModelSpec

__all__ = [
    "BaseStateDictAdapter",
    "KVCache",
    "LoadReport",
    "ModelSpec",
    "base_fingerprint",
    "get_model_spec",
    "load_hf_weights",
    "load_pretrained",
    "model_specs",
    "weights_fingerprint",
]
