"""Gemma's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class GemmaStateDictAdapter(DecoderStateDictAdapter):
    """The names of Gemma: those of every decoder."""
