"""Mistral under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import MistralConfig


class MistralModel(Decoder):
    """Mistral for causal language modelling: a sliding window on every layer."""

    config: MistralConfig
