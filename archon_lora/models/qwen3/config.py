"""Qwen3's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from archon_lora.models.config_values import check_flag
from archon_lora.models.decoder_config import DecoderConfig, Traits, refuse_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """The values that decide what a Qwen3 model computes; see the base class for the others.

    Attributes:
        attention_bias: the four attention projections have biases.
    """

    model_type: ClassVar[str] = "qwen3"
    required: ClassVar[tuple[str, ...]] = (*DecoderConfig.required, "num_key_value_heads")

    head_dim: int = 128
    attention_bias: bool = False

    def check_family(self) -> None:
        """Check the flag.

        Raises:
            ModelLoadError: it is neither true nor false.
        """
        check_flag("attention_bias", self.attention_bias)

    def traits(self) -> Traits:
        """Norms on query and key heads."""
        bias = self.attention_bias
        return Traits(qkv_bias=bias, out_bias=bias, qk_norm=True)

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse sliding windows.

        Raises:
            ModelLoadError: such a setting.
        """
        refuse_windows(raw)
