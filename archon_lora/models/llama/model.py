"""Llama under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import LlamaConfig


class LlamaModel(Decoder):
    """Llama for causal language modelling."""

    config: LlamaConfig
