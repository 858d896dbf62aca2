"""Qwen2's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from archon_lora.models.decoder_config import DecoderConfig, Traits, refuse, refuse_windows


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config(DecoderConfig):
    """The values that decide what a Qwen2 model computes; see the base class for them."""

    model_type: ClassVar[str] = "qwen2"

    def traits(self) -> Traits:
        """Biases on q, k and v."""
        return Traits(qkv_bias=True)

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse sliding windows and heads of another width.

        Raises:
            ModelLoadError: such a setting.
        """
        refuse_windows(raw)
        head_dim = raw.get("head_dim")
        if head_dim is not None and head_dim != raw["hidden_size"] // raw["num_attention_heads"]:
            refuse(raw, "head_dim", "heads are hidden_size / num_attention_heads wide")
