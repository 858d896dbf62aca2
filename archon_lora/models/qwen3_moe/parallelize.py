"""Qwen3-MoE is prepared for training on a mesh as every decoder is."""

from __future__ import annotations

from archon_lora.models.sharding import parallelize

__all__ = ["parallelize"]
