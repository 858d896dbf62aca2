"""What a base model's ``config.json`` tells about the modules that an adapter may name.

Of the families listed here every linear layer and its shape is known (names and shapes are those
of the transformers library); of any other model only the number of layers, if it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias

from ckpt.errors import ConfigError

DENSE: Final = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"})
"""Decoders with ``self_attn.{q,k,v,o}_proj`` and ``mlp.{gate,up,down}_proj``."""

MOE: Final = frozenset({"qwen2_moe", "qwen3_moe", "mixtral"})
"""The same attention, but some other MLP, which is not judged here."""

FUSED: Final = frozenset({"phi3"})
"""Models that have fused projections themselves, so that such names are no mistake there."""

EXPERTS_3D: Final = frozenset(
    {"gpt_oss", "qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe", "interns1_pro"}
)
"""Models for which vLLM wants one tensor for all experts instead of one for each."""

EXPERTS_STACKED: Final = frozenset({"qwen3_5_moe", "qwen3_5_moe_text"})
"""Models of which PEFT reads adapters on experts in the stacked form only."""

EMBEDDING_LORA: Final = frozenset({"llama", "qwen3", "qwen3_moe", "mixtral"})
"""Models on whose embeddings and output head vLLM takes an adapter."""

NO_EMBEDDING_LORA: Final = frozenset(
    {"qwen2", "deepseek_v2", "deepseek_v3", "gemma", "gemma2", "gemma3_text"}
)
"""Models on which it does not."""

Standing: TypeAlias = Literal["known", "absent", "elsewhere", "layer", "unjudged"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The base model as far as an adapter's names and shapes depend on it.

    Attributes:
        model_type: the family's name in ``config.json``.
        layers: number of decoder layers, or None.
        vocab: size of the vocabulary, or None.
        experts: experts in a layer, or None.
        linears: (in, out) of each linear layer by its name below ``model.layers.<i>.``, or None
            for a family that is not known here.
        opaque: beginnings of names below a layer that are not judged.
    """

    model_type: str
    layers: int | None
    vocab: int | None
    experts: int | None
    linears: Mapping[str, tuple[int, int]] | None
    opaque: tuple[str, ...] = ()
    hidden: int | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> BaseModel:
        """Read the content of a HuggingFace ``config.json``.

        Raises:
            ConfigError: it names no model type, or a size is no number.
        """
        inner = config.get("text_config")
        if isinstance(inner, Mapping) and "num_hidden_layers" in inner:
            # A model of several parts: names depend on the class that loads it.
            return cls(
                str(config.get("model_type")),
                _size(inner, "num_hidden_layers"),
                _size(inner, "vocab_size"),
                None,
                None,
            )
        family = config.get("model_type")
        if not isinstance(family, str) or not family:
            raise ConfigError(f"config.json must name its model_type, got {family!r}")
        experts = _size(config, "num_experts") or _size(config, "num_local_experts")
        layers, vocab = _size(config, "num_hidden_layers"), _size(config, "vocab_size")
        if family not in DENSE | MOE:
            return cls(family, layers, vocab, experts, None)
        hidden = _wanted(config, "hidden_size")
        heads = _wanted(config, "num_attention_heads")
        groups = _size(config, "num_key_value_heads") or heads
        width = _size(config, "head_dim") or hidden // heads
        linears = {
            "self_attn.q_proj": (hidden, heads * width),
            "self_attn.k_proj": (hidden, groups * width),
            "self_attn.v_proj": (hidden, groups * width),
            "self_attn.o_proj": (heads * width, hidden),
        }
        if family in DENSE:
            inner_size = _wanted(config, "intermediate_size")
            linears["mlp.gate_proj"] = linears["mlp.up_proj"] = (hidden, inner_size)
            linears["mlp.down_proj"] = (inner_size, hidden)
        opaque = ("mlp.", "block_sparse_moe.") if family in MOE else ()
        proxy = MappingProxyType(linears)
        return cls(family, layers, vocab, experts, proxy, opaque, hidden)

    @property
    def fused(self) -> bool | None:
        """Whether it has fused projections; None if that is not known."""
        if self.linears is not None:
            return False
        return True if self.model_type in FUSED else None

    def standing(self, module: str) -> Standing:
        """Whether the model has a module of that name.

        Returns:
            ``known``; ``layer``: it would lie in a layer beyond the last; ``elsewhere``: it has
            the module under another path; ``absent``; or ``unjudged``.
        """
        head, found, rest = module.rpartition("layers.")
        number, _, inner = rest.partition(".")
        if found and number.isdecimal() and self.layers is not None and int(number) >= self.layers:
            return "layer"
        if self.linears is None:
            return "unjudged"
        if not found or not number.isdecimal():
            if module in ("lm_head", "model.embed_tokens"):
                return "known"
            last = module.rpartition(".")[2]
            known = {name.rpartition(".")[2] for name in self.linears}
            return "elsewhere" if last in known | {"lm_head", "embed_tokens"} else "absent"
        if inner.startswith(self.opaque) and self.opaque:
            return "known" if head == "model." else "elsewhere"
        if inner in self.linears:
            return "known" if head == "model." else "elsewhere"
        last = inner.rpartition(".")[2]
        known = {name.rpartition(".")[2] for name in self.linears}
        return "elsewhere" if last in known else "absent"

    def shape_of(self, module: str) -> tuple[int, int] | None:
        """(in, out) of a linear layer, or None if it is not known."""
        if module == "lm_head" and self.hidden and self.vocab:
            return self.hidden, self.vocab
        if self.linears is None:
            return None
        _, found, rest = module.rpartition("layers.")
        return self.linears.get(rest.partition(".")[2]) if found else None


def _size(config: Mapping[str, Any], name: str) -> int | None:
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"config.json: {name} must be an integer >= 1, got {value!r}")
    return value


def _wanted(config: Mapping[str, Any], name: str) -> int:
    value = _size(config, name)
    if value is None:
        raise ConfigError(f"config.json of a {config['model_type']} model lacks {name}")
    return value
