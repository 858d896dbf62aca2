"""Qwen3-MoE's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from archon_lora.models.decoder_names import ATTENTION_MODULES, FEED_FORWARD_MODULES
from archon_lora.models.expert_names import HF_ROUTER, ROUTER, ExpertStateDictAdapter

from .config import Qwen3MoeConfig


class Qwen3MoeStateDictAdapter(ExpertStateDictAdapter):
    """The names of Qwen3-MoE: Qwen3's, with experts and routers.

    The feed-forward blocks of layers without experts are no modules that LoRA may target.
    """

    peft_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION_MODULES,
        ROUTER: HF_ROUTER,
        "output": "lm_head",
    }

    model_config: Qwen3MoeConfig

    def _base_map(self) -> Mapping[str, str]:
        return {**super()._base_map(), f"{HF_ROUTER}.weight": f"{ROUTER}.weight"}

    def refused_linear(self) -> frozenset[str]:
        """HF names of the feed-forward blocks of layers without experts."""
        return frozenset(self._written_out(FEED_FORWARD_MODULES).values())
