"""Qwen2 under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import Qwen2Config


class Qwen2Model(Decoder):
    """Qwen2 for causal language modelling: biases on q, k and v."""

    config: Qwen2Config
