"""Adapters that engines treat differently, each with what every engine does about it.

The base is the tiny Qwen2 of ``archon-lora make-tiny --hidden 128``, which real engines can serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ckpt.lint import Effect
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME

HIDDEN, INNER, LAYERS, HEADS, GROUPS, VOCAB = 128, 128, 2, 4, 2, 97
RANK = 4
BASE_CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 64,
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN * GROUPS // HEADS),
    "self_attn.v_proj": (HIDDEN, HIDDEN * GROUPS // HEADS),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INNER),
    "mlp.up_proj": (HIDDEN, INNER),
    "mlp.down_proj": (INNER, HIDDEN),
}
"""(in, out) of the linear modules of a layer."""

ALL = tuple(SHAPES)
QKV = ALL[:3]
QV = (ALL[0], ALL[2])

REFUSED, WRONG, DIES, TAKEN = Effect.REFUSED, Effect.WRONG, Effect.DIES, Effect.TAKEN


@dataclass
class Adapter:
    """A PEFT directory in the making; ``deltas`` is what it was trained to add, by module."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    deltas: dict[str, torch.Tensor]
    weights: str = WEIGHTS_NAME
    files: dict[str, bytes | None] = field(default_factory=dict)
    name: str = "adapter"

    def rename(self, change: Callable[[str], str]) -> None:
        self.tensors = {change(key): tensor for key, tensor in self.tensors.items()}

    def drop(self, ending: str) -> None:
        self.tensors = {k: t for k, t in self.tensors.items() if not k.endswith(ending)}

    def write(self, directory: Path) -> Path:
        """Write all files; those of ``files`` last, where None takes one away."""
        directory.mkdir(parents=True, exist_ok=True)
        own = {key: tensor.contiguous().clone() for key, tensor in self.tensors.items()}
        if self.weights.endswith(".safetensors"):
            save_file(own, directory / self.weights, metadata={"format": "pt"})
        else:
            torch.save(own, directory / self.weights)
        (directory / CONFIG_NAME).write_text(json.dumps(self.config))
        for name, data in self.files.items():
            if data is None:
                (directory / name).unlink()
            else:
                (directory / name).write_bytes(data)
        return directory


def adapter(
    modules: tuple[str, ...] = ALL,
    *,
    rank: int = RANK,
    alpha: int = 8,
    ranks: dict[str, int] | None = None,
    scaling: Callable[[str, int], float] | None = None,
) -> Adapter:
    """An adapter that every engine computes alike.

    Args:
        modules: names below a layer.
        rank: ``r``.
        alpha: ``lora_alpha``.
        ranks: ranks of modules that have another one, by their last name.
        scaling: (module, rank) → what B @ A is multiplied with; ``alpha / rank`` by default.
    """
    generator = torch.Generator().manual_seed(3)
    tensors, deltas = {}, {}
    for layer in range(LAYERS):
        for module in modules:
            name = f"model.layers.{layer}.{module}"
            have = (ranks or {}).get(module.rpartition(".")[2], rank)
            into, out = SHAPES[module]
            a = torch.randn(have, into, generator=generator) * 0.2
            b = torch.randn(out, have, generator=generator) * 0.2
            factor = scaling(module, have) if scaling else alpha / have
            deltas[name] = factor * (b @ a)
            tensors[f"base_model.model.{name}.lora_A.weight"] = a
            tensors[f"base_model.model.{name}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny-qwen2",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
    }
    return Adapter(config, tensors, deltas)


def changed(**fields: Any) -> Adapter:
    made = adapter()
    made.config.update(fields)
    return made


def _without(*fields: str, modules: tuple[str, ...] = ALL) -> Adapter:
    made = adapter(modules)
    for name in fields:
        del made.config[name]
    return made


def _renamed(change: Callable[[str], str], modules: tuple[str, ...] = ALL) -> Adapter:
    made = adapter(modules)
    made.rename(change)
    return made


def _no_prefix() -> Adapter:
    return _renamed(lambda key: key.removeprefix("base_model.model."))


def _short_path() -> Adapter:
    return _renamed(lambda key: key.replace("base_model.model.model.", "base_model.model."))


def _adapter_name() -> Adapter:
    return _renamed(lambda key: key.replace(".weight", ".default.weight"))


def _rank_pattern(ranks: dict[str, int]) -> Adapter:
    made = adapter(ranks=ranks)
    made.config["rank_pattern"] = dict(ranks)
    return made


def _alpha_pattern() -> Adapter:
    made = adapter(scaling=lambda module, rank: (2 if module.endswith("o_proj") else 8) / rank)
    made.config["alpha_pattern"] = {"o_proj": 2}
    return made


def _rslora() -> Adapter:
    made = adapter(scaling=lambda _module, rank: 8 / rank**0.5)
    made.config["use_rslora"] = True
    return made


def _dora() -> Adapter:
    made = changed(use_dora=True)
    for key in [key for key in made.tensors if "lora_A" in key]:
        out = made.deltas[key.removeprefix("base_model.model.").partition(".lora_A")[0]].shape[0]
        made.tensors[key.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(out)
    return made


def _modules_to_save() -> Adapter:
    made = changed(modules_to_save=["lm_head"])
    head = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(9))
    made.tensors["base_model.model.lm_head.weight"] = head
    return made


def _lora_bias() -> Adapter:
    made = changed(lora_bias=True)
    for key in [key for key in made.tensors if "lora_B" in key]:
        made.tensors[key.replace("weight", "bias")] = torch.ones(made.tensors[key].shape[0])
    return made


def _bias() -> Adapter:
    made = changed(bias="all")
    made.tensors["base_model.model.model.layers.0.self_attn.q_proj.bias"] = torch.ones(HIDDEN)
    return made


def _embedding() -> Adapter:
    made = adapter()
    made.tensors["base_model.model.model.embed_tokens.weight"] = torch.ones(VOCAB, HIDDEN)
    return made


def _lying_rank() -> Adapter:
    made = adapter(rank=8)
    made.config["r"] = 4
    return made


def _without_a_factor(side: str) -> Adapter:
    made = adapter()
    made.drop(f"layers.1.self_attn.o_proj.lora_{side}.weight")
    return made


def _fused() -> Adapter:
    made = adapter((*QKV, "self_attn.o_proj"))  # of qkv_proj alone PEFT finds no module at all
    for layer in range(LAYERS):
        parts = [f"base_model.model.model.layers.{layer}.{module}" for module in QKV]
        a = torch.cat([made.tensors.pop(f"{part}.lora_A.weight") for part in parts])
        b = [made.tensors.pop(f"{part}.lora_B.weight") for part in parts]
        key = parts[0].replace("q_proj", "qkv_proj")
        made.tensors[f"{key}.lora_A.weight"] = a[:RANK]
        made.tensors[f"{key}.lora_B.weight"] = torch.cat(b)
    made.config["target_modules"] = ["o_proj", "qkv_proj"]
    return made


def _extra_layer() -> Adapter:
    made = adapter()
    for side in "AB":
        key = f"base_model.model.model.layers.1.self_attn.o_proj.lora_{side}.weight"
        made.tensors[key.replace("layers.1", "layers.7")] = made.tensors[key]
    return made


def _empty() -> Adapter:
    made = adapter()
    made.tensors = {}
    return made


def _not_a_number() -> Adapter:
    made = adapter()
    made.tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][1, 2] = float(
        "nan"
    )
    return made


def _sharded() -> Adapter:
    made = adapter()
    made.weights = "adapter_model-00001-of-00001.safetensors"
    keys = dict.fromkeys(made.tensors, made.weights)
    index = {"metadata": {}, "weight_map": keys}
    made.files["adapter_model.safetensors.index.json"] = json.dumps(index).encode()
    return made


@dataclass(frozen=True)
class Row:
    """One kind of adapter: which rules it breaks, and the gravest effect at every engine.

    An engine that is not named computes what was trained. With ``doubtful``, the adapter does not
    show it for certain, so that all is a warning. ``family`` is of a base model of another kind.
    """

    build: Callable[[], Adapter]
    codes: frozenset[str] = frozenset()
    peft: Effect | None = None
    vllm: Effect | None = None
    sglang: Effect | None = None
    doubtful: bool = False
    base: bool = True
    family: str | None = None


def row(build: Callable[[], Adapter], *codes: str, **effects: Effect) -> Row:
    return Row(build, frozenset(codes), **effects)


ROWS: dict[str, Row] = {
    "portable": row(adapter),
    "no-prefix": row(_no_prefix, "key-prefix", peft=WRONG),
    "short-path": row(_short_path, "key-path", peft=WRONG, vllm=WRONG),
    "adapter-name": row(_adapter_name, "key-adapter-name", vllm=REFUSED),
    "rank-pattern-in-a-group": row(
        lambda: _rank_pattern({"q_proj": 2}), "mixed-rank-group", vllm=TAKEN, sglang=REFUSED
    ),
    "rank-pattern-alone": row(
        lambda: _rank_pattern({"o_proj": 2}), "mixed-rank", vllm=TAKEN, sglang=DIES
    ),
    "alpha-pattern": row(_alpha_pattern, "alpha-pattern", vllm=TAKEN, sglang=WRONG),
    "rslora": row(_rslora, "rslora", sglang=WRONG),
    "dora": row(_dora, "dora", vllm=REFUSED, sglang=REFUSED),
    "modules-to-save": row(
        _modules_to_save, "modules-to-save", "saved-embedding", vllm=REFUSED, sglang=WRONG
    ),
    "lora-bias": row(_lora_bias, "lora-bias", vllm=REFUSED, sglang=DIES),
    "bias": row(_bias, "bias", vllm=REFUSED, sglang=WRONG),
    "saved-embedding": row(_embedding, "saved-embedding", vllm=REFUSED, sglang=WRONG),
    "lying-rank": row(_lying_rank, "tensor-rank", peft=REFUSED, vllm=WRONG, sglang=DIES),
    "no-a": row(lambda: _without_a_factor("A"), "missing-a", peft=WRONG, vllm=WRONG, sglang=DIES),
    "no-b": row(lambda: _without_a_factor("B"), "missing-b", peft=WRONG, vllm=REFUSED, sglang=DIES),
    "only-q": row(lambda: adapter(ALL[:1]), "group-q-without-v", sglang=REFUSED),
    "q-and-k": row(lambda: adapter(ALL[:2]), "group-q-without-v", sglang=REFUSED),
    "k-and-v": row(lambda: adapter(ALL[1:3]), "group-without-q", sglang=DIES),
    "only-up": row(lambda: adapter(("mlp.up_proj",)), "group-up-without-gate", sglang=DIES),
    "q-and-v": row(lambda: adapter(QV)),
    "q-k-v": row(lambda: adapter(QKV)),
    "only-gate": row(lambda: adapter(("mlp.gate_proj",))),
    "only-o": row(lambda: adapter(("self_attn.o_proj",))),
    "fused-qkv": row(_fused, "fused-projection", peft=WRONG, vllm=REFUSED),
    "extra-layer": row(_extra_layer, "layer-range", peft=TAKEN, vllm=TAKEN, sglang=REFUSED),
    "empty": row(_empty, "empty", peft=WRONG, vllm=REFUSED, sglang=WRONG),
    "target-regex": row(
        lambda: changed(target_modules=r".*\.(self_attn|mlp)\..*_proj"),
        "target-modules-regex",
        sglang=REFUSED,
    ),
    "no-targets": row(
        lambda: _without("target_modules", modules=QV),
        "target-modules-missing",
        peft=TAKEN,
        vllm=REFUSED,
        sglang=REFUSED,
    ),
    "no-targets-for-more": row(
        lambda: _without("target_modules"),
        "target-modules-missing",
        "target-modules-default",
        peft=WRONG,
        vllm=REFUSED,
        sglang=REFUSED,
    ),
    "no-peft-type": row(
        lambda: _without("peft_type"), "peft-type-missing", peft=REFUSED, sglang=REFUSED
    ),
    "sharded": row(_sharded, "weights-name", peft=REFUSED, vllm=REFUSED),
    "nan": row(_not_a_number, "non-finite", peft=WRONG, vllm=WRONG, sglang=WRONG),
    "unknown-field": row(lambda: changed(brand_new_option=3), "field-unknown", peft=TAKEN),
}
"""Every row of the table of engines."""
