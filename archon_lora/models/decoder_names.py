"""HuggingFace's and PEFT's names of decoders of all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from .base import BaseStateDictAdapter
from .decoder_config import DecoderConfig

_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_OURS, _HF = "layers.{}", "model.layers.{}"

ATTENTION_MODULES: Mapping[str, str] = {
    f"{_OURS}.attention.{ours}": f"{_HF}.self_attn.{hf}" for ours, hf in _ATTENTION.items()
}
FEED_FORWARD_MODULES: Mapping[str, str] = {
    f"{_OURS}.feed_forward.{ours}": f"{_HF}.mlp.{hf}" for ours, hf in _FEED_FORWARD.items()
}
_QKV = {ours: hf for ours, hf in ATTENTION_MODULES.items() if not ours.endswith(".wo")}
_OUT = {ours: hf for ours, hf in ATTENTION_MODULES.items() if ours not in _QKV}

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


class DecoderStateDictAdapter(BaseStateDictAdapter):
    """Names of a decoder, as its configuration says it is built.

    A tied model has neither ``output`` nor an adapter on it.

    Attributes:
        model_config: the configuration.
    """

    base_from_hf: ClassVar[Mapping[str, str]] = {
        _EMBEDDING: "tok_embeddings.weight",
        f"{_HF}.input_layernorm.weight": f"{_OURS}.attention_norm.weight",
        "model.norm.weight": "norm.weight",
        _HEAD: "output.weight",
    }
    peft_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION_MODULES,
        **FEED_FORWARD_MODULES,
        "output": "lm_head",
    }
    output_module: ClassVar[str | None] = "output"
    # Checkpoints of transformers before 4.3x stored the rotary frequencies of every layer.
    ignored_hf: ClassVar[frozenset[str]] = frozenset(
        {"model.layers.{}.self_attn.rotary_emb.inv_freq"}
    )

    model_config: DecoderConfig

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.model_config.tie_word_embeddings

    def _base_map(self) -> Mapping[str, str]:
        traits = self.model_config.traits()
        names = dict(self.base_from_hf)
        if self.tied:
            del names[_HEAD]
        names |= self.block_norms()
        if traits.qk_norm:
            names |= {
                f"{_HF}.self_attn.{norm}.weight": f"{_OURS}.attention.{norm}.weight"
                for norm in ("q_norm", "k_norm")
            }
        linear = {**ATTENTION_MODULES, **FEED_FORWARD_MODULES}
        names |= {f"{hf}.weight": f"{ours}.weight" for ours, hf in linear.items()}
        for modules, biased in (
            (_QKV, traits.qkv_bias),
            (_OUT, traits.out_bias),
            (FEED_FORWARD_MODULES, traits.mlp_bias),
        ):
            if biased:
                names |= {f"{hf}.bias": f"{ours}.bias" for ours, hf in modules.items()}
        return names

    def block_norms(self) -> dict[str, str]:
        """HF to Archon names of a block's norms but the first.

        ``post_attention_layernorm`` is two things in HuggingFace: what stands before the
        feed-forward block, and in models with norms on both sides what follows the attention.
        """
        after = f"{_HF}.post_attention_layernorm.weight"
        if not self.model_config.traits().sandwich_norms:
            return {after: f"{_OURS}.ffn_norm.weight"}
        return {
            after: f"{_OURS}.attention_post_norm.weight",
            f"{_HF}.pre_feedforward_layernorm.weight": f"{_OURS}.ffn_norm.weight",
            f"{_HF}.post_feedforward_layernorm.weight": f"{_OURS}.ffn_post_norm.weight",
        }

    def to_peft_module_map(self) -> dict[str, str]:
        """See the base class; a tied head cannot be targeted: it would change the embedding too."""
        modules = super().to_peft_module_map()
        if self.tied:
            del modules["output"]
        return modules

    def hf_aliases(self) -> Mapping[str, str]:
        """Some tied checkpoints store the head as well."""
        return {_HEAD: self.hf_name(_EMBEDDING)} if self.tied else {}
