"""Qwen3 under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import Qwen3Config


class Qwen3Model(Decoder):
    """Qwen3 for causal language modelling: an RMSNorm on every query and key head."""

    config: Qwen3Config
