"""Mistral's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from archon_lora.models.config_values import check_count
from archon_lora.models.decoder_config import DecoderConfig, Traits, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class MistralConfig(DecoderConfig):
    """The values that decide what a Mistral model computes; see the base class for the others.

    Attributes:
        sliding_window: most keys that a query sees, itself included; None for all. A
            ``config.json`` without the key means 4096, one with null means None.
    """

    model_type: ClassVar[str] = "mistral"
    required: ClassVar[tuple[str, ...]] = (*DecoderConfig.required, "num_key_value_heads")
    nullable: ClassVar[frozenset[str]] = frozenset({"sliding_window"})

    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def check_family(self) -> None:
        """Check the window.

        Raises:
            ModelLoadError: it is below 1.
        """
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)

    def traits(self) -> Traits:
        """The same window on every layer."""
        return Traits(windows=(self.sliding_window,) * self.num_hidden_layers)

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse layers of several types.

        Raises:
            ModelLoadError: ``layer_types`` is set.
        """
        if raw.get("layer_types") is not None:
            refuse(raw, "layer_types", "Mistral's layers all have sliding_window")
