"""Gemma 3 under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import Gemma3Config


class Gemma3Model(Decoder):
    """Gemma 3's text model: norms on both sides and on heads, two rotary bases."""

    config: Gemma3Config
