"""Gemma 2's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class Gemma2StateDictAdapter(DecoderStateDictAdapter):
    """The names of Gemma 2: norms stand before and after attention and feed-forward."""
