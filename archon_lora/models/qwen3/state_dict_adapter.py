"""Qwen3's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class Qwen3StateDictAdapter(DecoderStateDictAdapter):
    """The names of Qwen3: those of every decoder, with the norms of query and key heads."""
