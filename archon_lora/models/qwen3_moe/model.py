"""Qwen3-MoE under Archon's names."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from archon_lora.models.decoder import Decoder, FeedForward, TransformerBlock
from archon_lora.models.decoder_config import DecoderConfig
from archon_lora.models.experts import MoE

from .config import Qwen3MoeConfig


class DenseFeedForward(FeedForward):
    """The feed-forward block of a layer without experts."""

    hf_projections: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")

    def untargetable(self, hf_name: str) -> dict[str, str]:
        """Why its projections take no adapter, by HF name, for ``apply_lora``."""
        reason = (
            "beside experts PEFT (0.21, with transformers 5) takes this name for theirs and drops "
            "the adapter; name q_proj, k_proj, v_proj and o_proj"
        )
        return {f"{hf_name}.{projection}": reason for projection in self.hf_projections}


class Qwen3MoeBlock(TransformerBlock):
    """A block with experts (``moe``) or without (``feed_forward``), as its layer has them."""

    def add_feed_forward(self, config: DecoderConfig, layer: int) -> None:
        """Experts in sparse layers."""
        if not isinstance(config, Qwen3MoeConfig):
            msg = f"config must be a Qwen3MoeConfig, got {type(config).__name__}"
            raise TypeError(msg)
        self.moe: MoE | None = None
        if config.sparse(layer):
            self.moe = MoE(
                config.hidden_size,
                config.moe_intermediate_size,
                experts=config.num_experts,
                per_token=config.num_experts_per_tok,
                normalise=config.norm_topk_prob,
            )
        else:
            self.feed_forward = DenseFeedForward(config)

    def feed(self, x_BSD: Tensor) -> Tensor:
        """Experts in sparse layers."""
        if self.moe is None:
            return super().feed(x_BSD)
        out: Tensor = self.moe(x_BSD)
        return out


class Qwen3MoeModel(Decoder):
    """Qwen3-MoE for causal language modelling: Qwen3's attention, experts behind it."""

    block_cls: ClassVar[type[TransformerBlock]] = Qwen3MoeBlock

    config: Qwen3MoeConfig
