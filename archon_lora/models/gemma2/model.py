"""Gemma 2 under Archon's names."""

from __future__ import annotations

from archon_lora.models.decoder import Decoder

from .config import Gemma2Config


class Gemma2Model(Decoder):
    """Gemma 2: norms on both sides, soft caps, a window on every other layer."""

    config: Gemma2Config
