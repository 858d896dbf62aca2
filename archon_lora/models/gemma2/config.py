"""Gemma 2's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from archon_lora.models.config_values import check_positive
from archon_lora.models.decoder_config import Traits
from archon_lora.models.gemma_config import WindowedGemmaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Config(WindowedGemmaConfig):
    """The values that decide what a Gemma 2 model computes; see the base classes for the others.

    Attributes:
        attn_logit_softcapping: scores are bent to ``cap * tanh(score / cap)``; None for not.
        final_logit_softcapping: the same of the output logits.
    """

    model_type: ClassVar[str] = "gemma2"
    nullable: ClassVar[frozenset[str]] = WindowedGemmaConfig.nullable | {
        "attn_logit_softcapping",
        "final_logit_softcapping",
    }

    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    def full_every(self) -> int:
        """Layers 1, 3, 5, ... see everything."""
        return 2

    def check_family(self) -> None:
        """Check the caps too.

        Raises:
            ModelLoadError: a value that no Gemma 2 model can have.
        """
        WindowedGemmaConfig.check_family(self)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))

    def traits(self) -> Traits:
        """Soft caps beside what both windowed generations have."""
        return replace(
            WindowedGemmaConfig.traits(self),
            attention_softcap=self.attn_logit_softcapping,
            logit_softcap=self.final_logit_softcapping,
        )
