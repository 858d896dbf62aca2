"""Llama's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from archon_lora.models.decoder_names import DecoderStateDictAdapter


class LlamaStateDictAdapter(DecoderStateDictAdapter):
    """The names of Llama: those of every decoder, and biases where the configuration has them."""
