"""Qwen2 (and Qwen2.5, which differs in values only)."""

from __future__ import annotations

from .config import Qwen2Config
from .model import Qwen2Model
from .parallelize import parallelize
from .state_dict_adapter import Qwen2StateDictAdapter

__all__ = ["Qwen2Config", "Qwen2Model", "Qwen2StateDictAdapter", "parallelize"]
