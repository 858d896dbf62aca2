"""Qwen3.5's names: Archon, HuggingFace and PEFT; the model itself is not built here.

Three layers in four have linear attention, ``linear_attn``. A feed-forward block is dense, or has
routed experts and one that all tokens share. ``q_proj`` is twice as wide as the heads: query and
gate, head by head. Inside the models of text and images, names begin with
``model.language_model.`` (``composite=True``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from archon_lora.errors import ModelLoadError

from .decoder_names import ATTENTION_MODULES, FEED_FORWARD_MODULES
from .expert_names import HF_ROUTER, ROUTER, ExpertStateDictAdapter
from .hf_files import read_config

_OURS, _HF = "layers.{}", "model.layers.{}"
_LINEAR: Final = "linear_attention"

LINEAR_ATTENTION_MODULES: Mapping[str, str] = {
    f"{_OURS}.linear_attn.{name}": f"{_HF}.linear_attn.{name}"
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
}
SHARED_EXPERT_MODULES: Mapping[str, str] = {
    f"{_OURS}.moe.shared_experts.{ours}": f"{_HF}.mlp.shared_expert.{hf}"
    for ours, hf in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj"))
}
_SHARED_GATE: Final = {f"{_OURS}.moe.shared_expert_gate": f"{_HF}.mlp.shared_expert_gate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3_5Layers:
    """What the names of a Qwen3.5 model depend on.

    Attributes:
        num_hidden_layers: number of blocks.
        layer_types: ``"linear_attention"`` or ``"full_attention"`` for each.
        num_experts: routed experts of a layer; 0 in dense models.
        tie_word_embeddings: the output head is the embedding.
    """

    num_hidden_layers: int
    layer_types: tuple[str, ...]
    num_experts: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        """Check that each layer has a type.

        Raises:
            ModelLoadError: another number of types, or one that is neither.
        """
        known = {_LINEAR, "full_attention"}
        if len(self.layer_types) != self.num_hidden_layers or not known.issuperset(
            self.layer_types
        ):
            msg = (
                f"layer_types must be {self.num_hidden_layers} of {', '.join(sorted(known))}, got "
                f"{self.layer_types}"
            )
            raise ModelLoadError(msg)

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts: all have, or none."""
        del layer
        return self.num_experts > 0

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Read them from a model directory or a parsed ``config.json``, composite or not.

        Raises:
            ModelLoadError: no such file, another family, or values that cannot be.
        """
        raw = source if isinstance(source, Mapping) else read_config(Path(source))
        text: Mapping[str, Any] = raw.get("text_config", raw)
        kind = str(text.get("model_type"))
        if kind not in ("qwen3_5_text", "qwen3_5_moe_text"):
            msg = f"model_type must be qwen3_5_text or qwen3_5_moe_text, got {kind!r}"
            raise ModelLoadError(msg)
        layers = text["num_hidden_layers"]
        types = text.get("layer_types")
        if types is None:
            every = text.get("full_attention_interval") or 4
            types = ["full_attention" if (i + 1) % every == 0 else _LINEAR for i in range(layers)]
        return cls(
            num_hidden_layers=layers,
            layer_types=tuple(types),
            num_experts=text.get("num_experts", 0) if "moe" in kind else 0,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        )


class Qwen3_5StateDictAdapter(ExpertStateDictAdapter):
    """The names of Qwen3.5, dense or with experts, text alone or inside a composite model.

    ``"all-linear"`` leaves out the router and ``shared_expert_gate``, which also decides between
    experts; both are targets by name.
    """

    model_config: Qwen3_5Layers  # type: ignore[assignment]  # of a decoder's values only the names'

    def to_peft_module_map(self) -> dict[str, str]:
        """See the base class."""
        modules = {**ATTENTION_MODULES, **LINEAR_ATTENTION_MODULES}
        if self.model_config.num_experts:
            modules |= {ROUTER: HF_ROUTER, **SHARED_EXPERT_MODULES, **_SHARED_GATE}
        else:
            modules |= FEED_FORWARD_MODULES
        if not self.tied:
            modules["output"] = "lm_head"
        return {ours: self.hf_name(hf) for ours, hf in modules.items()}

    def _base_map(self) -> Mapping[str, str]:
        names = dict(self.base_from_hf)
        if self.tied:
            del names["lm_head.weight"]
        names[f"{_HF}.post_attention_layernorm.weight"] = f"{_OURS}.ffn_norm.weight"
        for norm in ("q_norm", "k_norm"):
            names[f"{_HF}.self_attn.{norm}.weight"] = f"{_OURS}.attention.{norm}.weight"
        for name in ("A_log", "dt_bias", "conv1d.weight", "norm.weight"):
            names[f"{_HF}.linear_attn.{name}"] = f"{_OURS}.linear_attn.{name}"
        linear = {**ATTENTION_MODULES, **LINEAR_ATTENTION_MODULES}
        if self.model_config.num_experts:
            linear |= {ROUTER: HF_ROUTER, **SHARED_EXPERT_MODULES, **_SHARED_GATE}
        else:
            linear |= FEED_FORWARD_MODULES
        return names | {f"{hf}.weight": f"{ours}.weight" for ours, hf in linear.items()}

    def _written_out(self, modules: Mapping[str, str]) -> dict[str, str]:
        """Each layer with the attention that it has."""
        written = super()._written_out(modules)
        return {
            ours: hf
            for ours, hf in written.items()
            if (".linear_attn" not in ours or self._is_linear(ours))
            and (".attention." not in ours or not self._is_linear(ours))
        }

    def _is_linear(self, ours: str) -> bool:
        return self.model_config.layer_types[int(ours.split(".")[1])] == _LINEAR

    def from_hf_name(self, hf_name: str) -> str | None:
        """See the base class; the head that predicts further tokens (``mtp``) is left out."""
        return None if hf_name.startswith("mtp.") else super().from_hf_name(hf_name)
