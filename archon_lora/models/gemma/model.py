"""Gemma under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import GemmaConfig


class GemmaModel(Decoder):
    """Gemma for causal language modelling: offset norms, scaled embeddings, a tied head."""

    config: GemmaConfig
