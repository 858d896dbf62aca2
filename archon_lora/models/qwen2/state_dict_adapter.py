"""Qwen2's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class Qwen2StateDictAdapter(DecoderStateDictAdapter):
    """The names of Qwen2: those of every decoder, with biases on q, k and v."""
