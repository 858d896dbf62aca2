"""Mistral's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class MistralStateDictAdapter(DecoderStateDictAdapter):
    """The names of Mistral: those of every decoder."""
