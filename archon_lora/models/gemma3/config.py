"""Gemma 3's hyperparameters (text models), read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from archon_lora.errors import ModelLoadError
from archon_lora.models.config_values import check_count, check_positive
from archon_lora.models.decoder_config import Traits, refuse
from archon_lora.models.gemma_config import FULL, SLIDING, GemmaFamilyConfig, WindowedGemmaConfig
from archon_lora.models.rope_config import read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma3Config(WindowedGemmaConfig):
    """The values that decide what a Gemma 3 text model computes; see the base classes for others.

    ``rope_theta`` and ``rope_scaling`` are those of layers that see everything.

    Attributes:
        rope_local_base_freq: base of the rotary frequencies of layers with a window.
        sliding_window_pattern: one layer in so many sees everything, where ``layer_types`` is
            not given.
    """

    model_type: ClassVar[str] = "gemma3_text"
    default_rope_theta: ClassVar[float] = 1_000_000.0

    max_position_embeddings: int = 131_072
    rope_theta: float = 1_000_000.0
    rope_local_base_freq: float = 10_000.0
    sliding_window_pattern: int = 6

    def full_every(self) -> int:
        """As configured."""
        return self.sliding_window_pattern

    def check_family(self) -> None:
        """Check the second base and the pattern too.

        Raises:
            ModelLoadError: a value that no Gemma 3 model can have.
        """
        check_positive("rope_local_base_freq", self.rope_local_base_freq)
        check_count("sliding_window_pattern", self.sliding_window_pattern)
        WindowedGemmaConfig.check_family(self)

    def traits(self) -> Traits:
        """Norms on heads and a second rotary base."""
        return replace(
            WindowedGemmaConfig.traits(self),
            qk_norm=True,
            local_rope_theta=self.rope_local_base_freq,
        )

    @classmethod
    def refuse_unsupported(cls, raw: Mapping[str, Any]) -> None:
        """Refuse soft caps, which Gemma 3 gave up, and what no generation here computes.

        Raises:
            ModelLoadError: such a setting.
        """
        GemmaFamilyConfig.refuse_unsupported(raw)
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if raw.get(key) is not None:
                refuse(raw, key, "Gemma 3 has no soft caps")

    @classmethod
    def read_rope(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Two bases, from either spelling: keys beside each other, or an entry for each type.

        Raises:
            ModelLoadError: a scaling that is not computed here, or one on layers with a window.
        """
        nested = raw.get("rope_parameters")
        if not isinstance(nested, Mapping) or not {FULL, SLIDING} & nested.keys():
            theta, scaling = read_rope(raw, default_theta=cls.default_rope_theta)
            return {"rope_theta": theta, "rope_scaling": scaling}
        if unknown := sorted(nested.keys() - {FULL, SLIDING}):
            msg = f"config.json: rope_parameters has {unknown} beside the entries of layer types"
            raise ModelLoadError(msg)
        rest = {
            k: v for k, v in raw.items() if k not in {"rope_parameters", "rope_local_base_freq"}
        }
        local = {**rest, "rope_theta": None, "rope_scaling": None}
        local_theta, local_scaling = read_rope(
            local | {"rope_parameters": nested.get(SLIDING)},
            default_theta=raw.get("rope_local_base_freq") or 10_000.0,
        )
        if local_scaling is not None:
            refuse(raw, "rope_parameters", f"{SLIDING} layers have unscaled RoPE here")
        theta, scaling = read_rope(
            {**raw, "rope_parameters": nested.get(FULL)}, default_theta=cls.default_rope_theta
        )
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            "rope_local_base_freq": local_theta,
        }
