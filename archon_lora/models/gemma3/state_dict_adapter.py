"""Gemma 3's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class Gemma3StateDictAdapter(DecoderStateDictAdapter):
    """The names of Gemma 3: Gemma 2's, with the norms of query and key heads."""
