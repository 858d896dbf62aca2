"""Qwen3-MoE's hyperparameters, read from a HuggingFace ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from archon_lora.errors import ModelLoadError
from archon_lora.models.config_values import check_count, check_flag
from archon_lora.models.hf_files import read_config
from archon_lora.models.qwen3.config import Qwen3Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeConfig(Qwen3Config):
    """The values that decide what a Qwen3-MoE model computes; see the base classes for others.

    Attributes:
        head_dim: 0, the default, stands for ``hidden_size / num_attention_heads``.
        num_experts: experts in a layer.
        num_experts_per_tok: how many of them each token is sent to.
        moe_intermediate_size: feed-forward width of one expert.
        norm_topk_prob: the weights of a token's experts sum to 1.
        decoder_sparse_step: one layer in so many has experts, the others are dense.
        mlp_only_layers: indices of more dense layers.
    """

    model_type: ClassVar[str] = "qwen3_moe"
    required: ClassVar[tuple[str, ...]] = (
        *Qwen3Config.required,
        "num_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
    )

    head_dim: int = 0
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def check_family(self) -> None:
        """Check the experts' numbers too.

        Raises:
            ModelLoadError: a value that no Qwen3-MoE model can have.
        """
        Qwen3Config.check_family(self)
        for name in (
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "decoder_sparse_step",
        ):
            check_count(name, getattr(self, name))
        check_flag("norm_topk_prob", self.norm_topk_prob)
        for layer in self.mlp_only_layers:
            check_count("mlp_only_layers", layer, least=0)
        if self.num_experts_per_tok > self.num_experts:
            msg = (
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} must not exceed "
                f"num_experts {self.num_experts}"
            )
            raise ModelLoadError(msg)

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """See the base class; transformers 5 writes ``num_experts`` as ``num_local_experts``."""
        raw = dict(source if isinstance(source, Mapping) else read_config(Path(source)))
        local, experts = raw.pop("num_local_experts", None), raw.get("num_experts")
        if local is not None and experts is not None and local != experts:
            msg = f"config.json: num_experts is {experts!r}, but num_local_experts is {local!r}"
            raise ModelLoadError(msg)
        raw["num_experts"] = local if experts is None else experts
        # Not super(): a class with slots is made twice, and super() would mean the first.
        return Qwen3Config.from_hf.__func__(cls, raw)  # type: ignore[attr-defined,no-any-return]
