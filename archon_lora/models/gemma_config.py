"""What the hyperparameters of all Gemma generations share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from archon_lora.errors import ModelLoadError

from .config_values import check_count, check_flag, check_positive
from .decoder_config import DecoderConfig, Traits, refuse

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaFamilyConfig(DecoderConfig):
    """Offset norms, scaled embeddings, tanh-approximated gelu and, unless said, a tied head.

    Attributes:
        attention_bias: the four attention projections have biases.
    """

    required: ClassVar[tuple[str, ...]] = (*DecoderConfig.required, "num_key_value_heads")
    activation_keys: ClassVar[tuple[str, ...]] = ("hidden_activation",)
    activations: ClassVar[tuple[str, ...]] = ("gelu_pytorch_tanh",)

    head_dim: int = 256
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192
    attention_bias: bool = False

    def check_family(self) -> None:
        """Check the flag.

        Raises:
            ModelLoadError: it is neither true nor false.
        """
        check_flag("attention_bias", self.attention_bias)

    def traits(self) -> Traits:
        """What all generations have."""
        bias = self.attention_bias
        return Traits(
            qkv_bias=bias,
            out_bias=bias,
            offset_norms=True,
            activation="gelu_tanh",
            scale_embedding=True,
        )

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse attention to later tokens.

        Raises:
            ModelLoadError: it is switched on.
        """
        if raw.get("use_bidirectional_attention"):
            refuse(raw, "use_bidirectional_attention", "attention here is causal")


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedGemmaConfig(GemmaFamilyConfig, ABC):
    """Gemma 2 and 3: norms on both sides, layers with and without a window.

    Attributes:
        sliding_window: most keys that a query of a sliding layer sees, itself included.
        layer_types: ``full_attention`` or ``sliding_attention`` for each layer; empty for the
            generation's own order.
        query_pre_attn_scalar: scores are divided by its square root.
    """

    nullable: ClassVar[frozenset[str]] = frozenset({"sliding_window"})

    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] = ()
    query_pre_attn_scalar: float = 256

    @abstractmethod
    def full_every(self) -> int:
        """One layer in how many sees everything, where ``layer_types`` does not say."""

    def check_family(self) -> None:
        """Check window, layer types and scale.

        Raises:
            ModelLoadError: a value that no model of the family can have.
        """
        GemmaFamilyConfig.check_family(self)
        check_positive("query_pre_attn_scalar", self.query_pre_attn_scalar)
        every = self.full_every()
        kinds = self.layer_types or tuple(
            SLIDING if (layer + 1) % every else FULL for layer in range(self.num_hidden_layers)
        )
        object.__setattr__(self, "layer_types", kinds)
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {FULL, SLIDING}:
            msg = (
                f"config.json: layer_types must name {FULL} or {SLIDING} for each of "
                f"{self.num_hidden_layers} layers, got {list(kinds)}"
            )
            raise ModelLoadError(msg)
        if SLIDING in kinds:
            check_count("sliding_window", self.sliding_window)

    def traits(self) -> Traits:
        """What both generations have."""
        return replace(
            GemmaFamilyConfig.traits(self),
            sandwich_norms=True,
            attention_scale=self.query_pre_attn_scalar**-0.5,
            windows=tuple(
                self.sliding_window if kind == SLIDING else None for kind in self.layer_types
            ),
        )
