"""Adapters that break the rules which the table of engines has no row for."""

from __future__ import annotations

import io
import json
from typing import Any

import torch
from safetensors.torch import save

from support.lint_rows import (
    ALL,
    DIES,
    HIDDEN,
    QKV,
    QV,
    RANK,
    REFUSED,
    TAKEN,
    VOCAB,
    WRONG,
    Adapter,
    Row,
    adapter,
    changed,
    row,
)

EVERYWHERE = {"peft": REFUSED, "vllm": REFUSED, "sglang": REFUSED}
ALL_TAKE = {"peft": TAKEN, "vllm": TAKEN, "sglang": TAKEN}
ALL_WRONG = {"peft": WRONG, "vllm": WRONG, "sglang": WRONG}

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def without(*fields: str) -> Adapter:
    made = adapter()
    for name in fields:
        del made.config[name]
    return made


def files(**contents: bytes | None) -> Adapter:
    made = adapter()
    made.files = {name.replace("__", "."): data for name, data in contents.items()}
    return made


def weights(name: str) -> Adapter:
    made = adapter()
    made.weights = name
    return made


def named(name: str) -> Adapter:
    made = adapter()
    made.name = name
    return made


def default_rank(**fields: Any) -> Adapter:
    made = adapter(rank=8, alpha=8)
    for name in fields:
        del made.config[name]
    return made


def with_tensor(key: str, tensor: torch.Tensor, **fields: Any) -> Adapter:
    made = adapter()
    made.tensors[key] = tensor
    made.config.update(fields)
    return made


def cast(dtype: torch.dtype, ending: str = "") -> Adapter:
    made = adapter()
    for key, tensor in made.tensors.items():
        if key.endswith(ending):
            made.tensors[key] = (tensor * 10 if dtype == torch.int32 else tensor).to(dtype)
    for name in made.deltas if dtype.is_floating_point else ():
        a, b = (made.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        made.deltas[name] = 8 / RANK * (b.float() @ a.float())
    return made


def factors(made: Adapter, module: str, into: int, out: int, rank: int = RANK) -> None:
    made.tensors[f"base_model.model.{module}.lora_A.weight"] = torch.full((rank, into), 0.1)
    made.tensors[f"base_model.model.{module}.lora_B.weight"] = torch.full((out, rank), 0.1)
    made.deltas[module] = torch.full((out, into), 8 / RANK * rank * 0.01)


def modules(*names: str, rank: int = RANK) -> Adapter:
    """An adapter on modules of any name, of inner size 8."""
    made = adapter(())
    for name in names:
        factors(made, name, 8, 8, rank)
    made.config["target_modules"] = sorted({n.rpartition(".")[2] for n in names})
    return made


def experts(*numbers: int, ranks: dict[int, int] | None = None, **fields: Any) -> Adapter:
    made = adapter(QKV)
    for number in numbers:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{number}.{projection}"
            factors(made, name, 8, 8, (ranks or {}).get(number, RANK))
    made.config["target_modules"] += ["down_proj", "gate_proj", "up_proj"]
    made.config.update(fields)
    return made


def zeros(side: str) -> Adapter:
    made = adapter()
    for key, tensor in made.tensors.items():
        if f"lora_{side}" in key:
            made.tensors[key] = torch.zeros_like(tensor)
    for name, delta in made.deltas.items():
        made.deltas[name] = torch.zeros_like(delta)
    return made


def wrong_base_size() -> Adapter:
    made = adapter(QKV)
    made.tensors[f"{Q0}.lora_A.weight"] = torch.ones(RANK, HIDDEN + 8)
    return made


def _pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(adapter().tensors, buffer)
    return buffer.getvalue()


def _tokens(number: int) -> Adapter:
    return files(added_tokens__json=json.dumps({"<new>": number}).encode())


SAVED = save({"x": torch.ones(2)})
OTHER_B = save({f"{Q0}.lora_B.weight": torch.full((HIDDEN, RANK), 3.0)})

MORE: dict[str, Row] = {
    "no-config": row(lambda: files(adapter_config__json=None), "config-missing", **EVERYWHERE),
    "config-list": row(lambda: files(adapter_config__json=b"[1]"), "config-invalid", **EVERYWHERE),
    "config-cut": row(
        lambda: files(adapter_config__json=b'{"r": 4'), "config-invalid", **EVERYWHERE
    ),
    "no-weights": row(
        lambda: files(adapter_model__safetensors=None), "weights-missing", **EVERYWHERE
    ),
    "weights-cut": row(
        lambda: files(adapter_model__safetensors=SAVED[:-1]), "weights-damaged", **EVERYWHERE
    ),
    "weights-garbage": row(
        lambda: files(adapter_model__safetensors=b"PK\3\4" * 9), "weights-damaged", **EVERYWHERE
    ),
    "weights-bin": row(lambda: weights("adapter_model.bin"), "weights-pickle", **ALL_TAKE),
    "weights-bin-garbage": row(
        lambda: files(adapter_model__safetensors=None, adapter_model__bin=b"garbage"),
        "weights-pickle",
        "weights-damaged",
        **EVERYWHERE,
    ),
    "weights-pt": row(
        lambda: weights("adapter_model.pt"),
        "weights-pickle",
        "weights-pt",
        **{**ALL_TAKE, "peft": REFUSED},
    ),
    "another-safetensors": row(
        lambda: files(extra__safetensors=OTHER_B), "foreign-safetensors", sglang=WRONG
    ),
    "another-bin": row(lambda: files(adapter_model__bin=_pickled()), "foreign-weights", **ALL_TAKE),
    "tokens-beyond": row(lambda: _tokens(VOCAB), "added-tokens", sglang=REFUSED),
    "tokens-within": row(lambda: _tokens(VOCAB - 1)),
    "tokens-without-a-base": row(
        lambda: _tokens(3), "added-tokens", sglang=REFUSED, doubtful=True, base=False
    ),
    "name-moves": row(
        lambda: named("run7-latest"), "name-moving", vllm=WRONG, sglang=WRONG, doubtful=True
    ),
    "name-with-a-colon": row(lambda: named("a:b"), "name-unsafe", vllm=TAKEN, sglang=TAKEN),
    "another-peft-type": row(
        lambda: changed(peft_type="IA3"), "peft-type", peft=WRONG, vllm=TAKEN, sglang=REFUSED
    ),
    "no-r": row(
        lambda: default_rank(r=0), "rank-missing", peft=TAKEN, vllm=REFUSED, sglang=REFUSED
    ),
    "r-is-text": row(lambda: changed(r="4"), "rank-invalid", **EVERYWHERE),
    "no-alpha": row(
        lambda: default_rank(lora_alpha=0),
        "alpha-missing",
        peft=TAKEN,
        vllm=REFUSED,
        sglang=REFUSED,
    ),
    "alpha-is-no-number": row(lambda: changed(lora_alpha="x"), "alpha-invalid", **EVERYWHERE),
    "alpha-is-nan": row(lambda: changed(lora_alpha=float("nan")), "alpha-not-finite", **ALL_WRONG),
    "targets-empty": row(lambda: changed(target_modules=[]), "target-modules-empty", peft=REFUSED),
    "targets-of-numbers": row(
        lambda: changed(target_modules=[1]),
        "target-modules-invalid",
        "target-modules-none",
        peft=REFUSED,
        sglang=REFUSED,
    ),
    "targets-no-regex": row(
        lambda: changed(target_modules="("),
        "target-modules-invalid",
        "target-modules-none",
        peft=REFUSED,
        sglang=REFUSED,
    ),
    "targets-all-linear": row(lambda: changed(target_modules="all-linear")),
    "targets-all": row(lambda: changed(target_modules="all"), "target-modules-none", peft=REFUSED),
    "targets-of-another-model": row(
        lambda: changed(target_modules=["query_key_value"]),
        "target-modules-none",
        "target-modules-unused",
        "target-modules-sglang",
        peft=REFUSED,
        sglang=REFUSED,
    ),
    "targets-leave-some-out": row(
        lambda: changed(target_modules=["q_proj", "k_proj", "v_proj"]),
        "target-modules-cover",
        peft=WRONG,
    ),
    "exclude-some": row(
        lambda: changed(exclude_modules=["o_proj"]), "target-modules-cover", peft=WRONG
    ),
    "targets-without-tensors": row(lambda: _more_targets(), "target-modules-unused", peft=TAKEN),
    "layers-to-transform": row(
        lambda: changed(target_modules=r".*_proj", layers_to_transform=[0, 1]),
        "target-modules-regex",
        "layers-to-transform",
        peft=REFUSED,
        sglang=REFUSED,
    ),
    "rslora-on-experts": row(
        lambda: experts(0, 1, use_rslora=True),
        "rslora",
        "rslora-experts",
        vllm=TAKEN,
        sglang=WRONG,
        base=False,
    ),
    "rslora-of-rank-1": row(lambda: _rank_one()),
    "saved-head": row(
        lambda: with_tensor(
            "base_model.model.score.weight", torch.ones(2, 2), modules_to_save=["score"]
        ),
        "modules-to-save-head",
        sglang=WRONG,
        base=False,
    ),
    "pissa": row(
        lambda: changed(init_lora_weights="pissa"), "init-weights", vllm=REFUSED, sglang=WRONG
    ),
    "gaussian": row(lambda: changed(init_lora_weights="gaussian")),
    "qalora": row(lambda: changed(use_qalora=True), "variant", vllm=REFUSED, sglang=WRONG),
    "kasa": row(
        lambda: changed(kasa_config={"beta": 1}), "variant-unread", vllm=WRONG, sglang=WRONG
    ),
    "target-parameters": row(
        lambda: changed(target_parameters=["mlp.experts.gate_up_proj"]),
        "target-parameters",
        vllm=REFUSED,
        sglang=REFUSED,
        doubtful=True,
    ),
    "no-base-name": row(
        lambda: changed(base_model_name_or_path=""), "base-name-missing", peft=TAKEN, vllm=TAKEN
    ),
    "two-adapters": row(
        lambda: with_tensor(f"{Q0}.lora_A.default.weight", torch.ones(RANK, HIDDEN)),
        "key-twice",
        "key-adapter-name",
        peft=TAKEN,
        vllm=REFUSED,
        sglang=WRONG,
    ),
    "stranger": row(
        lambda: with_tensor("base_model.model.model.norm.weight", torch.full((HIDDEN,), 2.0)),
        "key-unknown",
        peft=TAKEN,
        vllm=REFUSED,
        sglang=WRONG,
    ),
    "base-layer-of-the-head": row(
        lambda: with_tensor("base_model.model.lm_head.base_layer.weight", torch.ones(2, 2))
    ),
    "head-factors": row(lambda: _head(), "embedding-lora", vllm=REFUSED, sglang=TAKEN),
    "three-dimensions": row(
        lambda: with_tensor(f"{Q0}.lora_A.weight", torch.ones(RANK, HIDDEN, 1)),
        "tensor-shape",
        peft=REFUSED,
        vllm=REFUSED,
        sglang=DIES,
    ),
    "rank-17": row(lambda: adapter(rank=17), "vllm-max-rank", vllm=REFUSED),
    "q-a-alone": row(
        lambda: modules("model.layers.0.self_attn.q_a_proj"),
        "group-q-a-without-kv-a",
        sglang=WRONG,
        base=False,
    ),
    "q-a-and-kv-a": row(
        lambda: modules(
            "model.layers.0.self_attn.q_a_proj", "model.layers.0.self_attn.kv_a_proj_with_mqa"
        ),
        base=False,
    ),
    "fused-without-a-base": row(
        lambda: modules("model.layers.0.self_attn.qkv_proj"),
        "fused-projection",
        peft=WRONG,
        vllm=REFUSED,
        doubtful=True,
        base=False,
    ),
    "short-path-without-a-base": row(
        lambda: _short(task_type=None),
        "key-path",
        peft=WRONG,
        vllm=WRONG,
        doubtful=True,
        base=False,
    ),
    "short-path-of-a-causal-model": row(
        lambda: _short(task_type="CAUSAL_LM"), "key-path", peft=WRONG, vllm=WRONG, base=False
    ),
    "no-such-module": row(
        lambda: modules("model.layers.0.attention.wq"),
        "module-absent",
        "target-modules-sglang",
        **{**EVERYWHERE, "peft": WRONG},
    ),
    "other-sizes": row(
        lambda: wrong_base_size(), "base-shape", peft=REFUSED, vllm=WRONG, sglang=DIES
    ),
    "fused-experts": row(
        lambda: _fused_experts(),
        "moe-fused-experts",
        "target-parameters",
        vllm=REFUSED,
        sglang=REFUSED,
        doubtful=True,
        base=False,
    ),
    "an-expert-missing": row(
        lambda: experts(0, 2), "moe-experts-missing", vllm=REFUSED, base=False
    ),
    "every-expert": row(lambda: experts(0, 1, 2), base=False),
    "experts-one-by-one": row(
        lambda: experts(0, 1, 2),
        "moe-experts-single",
        peft=WRONG,
        base=False,
        family="qwen3_5_moe_text",
    ),
    "experts-of-two-ranks": row(
        lambda: experts(0, 1, ranks={1: 2}, rank_pattern={r"experts\.1\.\w+": 2}),
        "moe-experts-ranks",
        vllm=REFUSED,
        base=False,
    ),
    "integers": row(lambda: cast(torch.int32), "dtype", **ALL_WRONG),
    "doubles": row(lambda: cast(torch.float64), "dtype-unusual", **ALL_TAKE),
    "eight-bit-floats": row(lambda: cast(torch.float8_e4m3fn), "dtype-unusual", **ALL_TAKE),
    "two-dtypes": row(lambda: cast(torch.bfloat16, "lora_A.weight"), "dtype-mixed", **ALL_TAKE),
    "bfloat16": row(lambda: cast(torch.bfloat16)),
    "untrained": row(lambda: zeros("B"), "no-effect", **ALL_TAKE),
    "zero-a": row(lambda: zeros("A"), "no-effect", **ALL_TAKE),
}
"""Each breaks rules of its own; together with the table's rows, every rule is broken once."""


def _more_targets() -> Adapter:
    made = adapter(QV)
    made.config["target_modules"] = ["k_proj", "q_proj", "v_proj"]
    return made


def _fused_experts() -> Adapter:
    made = adapter(QKV)
    factors(made, "model.layers.0.mlp.experts.base_layer", 8, 8)
    made.config["target_parameters"] = ["mlp.experts.gate_up_proj"]
    return made


def _rank_one() -> Adapter:
    made = adapter(rank=1, alpha=8)
    made.config["use_rslora"] = True
    return made


def _head() -> Adapter:
    made = adapter()
    factors(made, "lm_head", HIDDEN, VOCAB)
    made.config["target_modules"] = [*made.config["target_modules"], "lm_head"]
    return made


def _short(task_type: str | None) -> Adapter:
    made = adapter(ALL)
    made.rename(lambda key: key.replace("base_model.model.model.", "base_model.model."))
    made.config["task_type"] = task_type
    return made
