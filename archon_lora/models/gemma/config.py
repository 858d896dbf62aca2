"""Gemma's hyperparameters (first generation), read from a HuggingFace ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from archon_lora.models.gemma_config import GemmaFamilyConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig(GemmaFamilyConfig):
    """The values that decide what a Gemma model computes; see the base classes for them.

    The first releases write ``"hidden_act": "gelu"`` and mean its tanh approximation.
    """

    model_type: ClassVar[str] = "gemma"
    activation_keys: ClassVar[tuple[str, ...]] = ("hidden_act", "hidden_activation")
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh", "gelu")
