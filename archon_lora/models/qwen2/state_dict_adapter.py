"""Qwen2's names: Archon, HuggingFace and PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from archon_lora.models.base import BaseStateDictAdapter

_ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
_FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_LAYER_MODULES = {
    **{
        f"layers.{{}}.attention.{o}": f"model.layers.{{}}.self_attn.{h}"
        for o, h in _ATTENTION.items()
    },
    **{
        f"layers.{{}}.feed_forward.{o}": f"model.layers.{{}}.mlp.{h}"
        for o, h in _FEED_FORWARD.items()
    },
}

_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


class Qwen2StateDictAdapter(BaseStateDictAdapter):
    """The base maps of Qwen2 and its 16 LoRA maps (eight linear modules, A and B each).

    A tied model has neither ``output`` nor an adapter on it.
    """

    base_from_hf: ClassVar[Mapping[str, str]] = {
        _EMBEDDING: "tok_embeddings.weight",
        **{f"{hf}.weight": f"{ours}.weight" for ours, hf in _LAYER_MODULES.items()},
        **{
            f"model.layers.{{}}.self_attn.{hf}.bias": f"layers.{{}}.attention.{ours}.bias"
            for ours, hf in _ATTENTION.items()
            if ours != "wo"
        },
        "model.layers.{}.input_layernorm.weight": "layers.{}.attention_norm.weight",
        "model.layers.{}.post_attention_layernorm.weight": "layers.{}.ffn_norm.weight",
        "model.norm.weight": "norm.weight",
        _HEAD: "output.weight",
    }
    peft_modules: ClassVar[Mapping[str, str]] = {**_LAYER_MODULES, "output": "lm_head"}
    output_module: ClassVar[str | None] = "output"
    # Checkpoints of transformers before 4.3x stored the rotary frequencies of every layer.
    ignored_hf: ClassVar[frozenset[str]] = frozenset(
        {"model.layers.{}.self_attn.rotary_emb.inv_freq"}
    )

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(self.model_config.tie_word_embeddings)

    def _base_map(self) -> Mapping[str, str]:
        if not self.tied:
            return self.base_from_hf
        return {hf: ours for hf, ours in self.base_from_hf.items() if hf != _HEAD}

    def to_peft_module_map(self) -> dict[str, str]:
        """See the base class; a tied head cannot be targeted: it would change the embedding too."""
        modules = dict(self.peft_modules)
        if self.tied:
            del modules["output"]
        return modules

    def hf_aliases(self) -> Mapping[str, str]:
        """Some tied checkpoints store the head as well."""
        return {_HEAD: _EMBEDDING} if self.tied else {}
