"""Llama's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from archon_lora.models.config_values import check_flag
from archon_lora.models.decoder_config import DecoderConfig, Traits


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    """The values that decide what a Llama model computes; see the base class for the others.

    Attributes:
        attention_bias: the four attention projections have biases.
        mlp_bias: the three feed-forward projections have biases.
    """

    model_type: ClassVar[str] = "llama"

    max_position_embeddings: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False

    def check_family(self) -> None:
        """Check the two flags.

        Raises:
            ModelLoadError: one is neither true nor false.
        """
        check_flag("attention_bias", self.attention_bias)
        check_flag("mlp_bias", self.mlp_bias)

    def traits(self) -> Traits:
        """Biases as configured."""
        bias = self.attention_bias
        return Traits(qkv_bias=bias, out_bias=bias, mlp_bias=self.mlp_bias)
