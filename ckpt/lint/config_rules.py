"""What ``adapter_config.json`` alone, or beside the tensors' names, gives away."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

from .codes_config import CONFIG_RULES
from .finding import Finding, findings
from .subject import Subject, is_rank, parse_expert

_RULES: Final = {rule.code: rule for rule in CONFIG_RULES}

PEFT_FIELDS: Final = frozenset(
    {
        "alora_invocation_tokens",
        "alpha_pattern",
        "arrow_config",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "kasa_config",
        "layer_replication",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_bdlora",
        "use_dora",
        "use_qalora",
        "use_rslora",
        "velora_config",
    }
)
"""Fields of PEFT's LoRA configuration, release 0.21."""

_WHOLE_MODEL: Final = ("all", "all-linear")
SGLANG_MODULES: Final = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        *("gate_proj", "up_proj", "down_proj", "gate_up_proj"),
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
        *("wq_b", "wk", "weights_proj", "qkvr", "wo_ud", "embed_tokens", "lm_head"),
        *("embeddings", "output", "unembed_tokens", "vocab_emb", "word_embeddings"),
    }
)
"""What SGLang 0.5.23 takes for ``--lora-target-modules``, and its other names for the last two."""

_PEFT_DEFAULT: Final = (".q_proj", ".v_proj")
_HEADS: Final = frozenset({"classifier", "score"})
_VLLM_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_VARIANTS: Final = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
_UNREAD_VARIANTS: Final = (
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "trainable_token_indices",
    "velora_config",
)


def config_findings(subject: Subject) -> Iterator[Finding]:
    """Everything that the configuration shows."""
    checks: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
        _kind,
        _numbers,
        _targets,
        _coverage,
        _scaling,
        _extras,
        _others,
    )
    for check in checks:
        yield from check(subject)


def _say(
    code: str, wheres: Sequence[str], detail: str, *, certain: bool = True
) -> Iterator[Finding]:
    return findings(_RULES[code], wheres, detail, certain=certain)


def _kind(subject: Subject) -> Iterator[Finding]:
    kind = subject.config.get("peft_type")
    if kind is None:
        yield from _say("peft-type-missing", ["peft_type"], "peft_type is not there")
    elif not isinstance(kind, str) or kind.upper() != "LORA":
        yield from _say("peft-type", ["peft_type"], f"peft_type is {kind!r}")


def _numbers(subject: Subject) -> Iterator[Finding]:
    rank, alpha = subject.config.get("r"), subject.config.get("lora_alpha")
    if rank is None:
        yield from _say("rank-missing", ["r"], "r is not there")
    elif not is_rank(rank):
        yield from _say("rank-invalid", ["r"], f"r is {rank!r}")
    if alpha is None:
        yield from _say("alpha-missing", ["lora_alpha"], "lora_alpha is not there")
    elif not isinstance(alpha, int | float) or isinstance(alpha, bool):
        yield from _say("alpha-invalid", ["lora_alpha"], f"lora_alpha is {alpha!r}")
    elif not math.isfinite(alpha):
        yield from _say("alpha-not-finite", ["lora_alpha"], f"lora_alpha is {alpha!r}")


def _targets(subject: Subject) -> Iterator[Finding]:
    field, targets = "target_modules", subject.config.get("target_modules")
    if targets is None:
        yield from _say("target-modules-missing", [field], f"{field} is not there")
        more = [f.key for f in subject.factors if not f.module.endswith(_PEFT_DEFAULT)]
        detail = f"{field} is not there, and {more[0]!r} is" if more else ""
        # Of a few families PEFT's own list is another one.
        certain = subject.base is not None and subject.base.linears is not None
        yield from _say("target-modules-default", more, detail, certain=certain)
    elif isinstance(targets, str) and targets:
        if targets in _WHOLE_MODEL:
            return
        if _compiled(targets) is None:
            yield from _say("target-modules-invalid", [field], f"{field} is {targets!r}")
            return
        yield from _say("target-modules-regex", [field], f"{field} is {targets!r}")
        if subject.config.get("layers_to_transform") is not None:
            detail = f"layers_to_transform is set and {field} is {targets!r}"
            yield from _say("layers-to-transform", ["layers_to_transform"], detail)
    elif targets in ([], ""):
        if _is_used(subject.config.get("target_parameters")):
            return  # an adapter on experts alone
        yield from _say("target-modules-empty", [field], f"{field} is {targets!r}")
    elif isinstance(targets, list) and all(isinstance(name, str) for name in targets):
        strange = [name for name in targets if name.rpartition(".")[2] not in SGLANG_MODULES]
        detail = f"{field} has {strange[0]!r}" if strange else ""
        yield from _say("target-modules-sglang", strange, detail)
    else:
        yield from _say("target-modules-invalid", [field], f"{field} is {targets!r}")


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern)
    except re.error:
        return None


def _matches(module: str, targets: object) -> bool:
    """Whether PEFT's rule for ``target_modules`` (and ``exclude_modules``) takes a module."""
    if isinstance(targets, str):
        pattern = _compiled(targets)
        return pattern is not None and pattern.fullmatch(module) is not None
    if isinstance(targets, Sequence):
        return any(
            isinstance(target, str) and (module == target or module.endswith(f".{target}"))
            for target in targets
        )
    return False


def _coverage(subject: Subject) -> Iterator[Finding]:
    """Whether PEFT's way from names to modules leads to the modules that have tensors."""
    targets = subject.config.get("target_modules")
    modules = sorted({factor.module for factor in subject.factors})
    if not targets or not modules or targets == "all-linear":
        return
    if subject.config.get("target_parameters"):
        return  # they have tensors of their own, whose names no target_modules explains
    excluded = subject.config.get("exclude_modules")
    lost = [
        module for module in modules if not _matches(module, targets) or _matches(module, excluded)
    ]
    field = "target_modules" if not excluded else "target_modules or exclude_modules"
    detail = f"{field} leaves out {lost[0]!r}" if lost else ""
    code = "target-modules-none" if len(lost) == len(modules) else "target-modules-cover"
    yield from _say(code, lost, detail)
    if isinstance(targets, list):
        unused = [
            target
            for target in targets
            if isinstance(target, str) and not any(_matches(name, [target]) for name in modules)
        ]
        detail = (
            f"target_modules has {unused[0]!r}, for which there are no tensors" if unused else ""
        )
        yield from _say("target-modules-unused", unused, detail)


def _scaling(subject: Subject) -> Iterator[Finding]:
    config, rank = subject.config, subject.rank
    patterns = config.get("alpha_pattern") or {}
    alpha = config.get("lora_alpha")
    if isinstance(patterns, Mapping):
        other = [str(pattern) for pattern, value in patterns.items() if value != alpha]
        detail = f"alpha_pattern gives {other[0]!r} another alpha than {alpha!r}" if other else ""
        yield from _say("alpha-pattern", other, detail)
    if config.get("use_rslora") and rank != 1:
        yield from _say("rslora", ["use_rslora"], f"use_rslora is set, r is {rank}")
        experts = [f.module for f in subject.factors if parse_expert(f.module)]
        detail = f"use_rslora is set and {experts[0]!r} has factors" if experts else ""
        yield from _say("rslora-experts", experts, detail)


def _extras(subject: Subject) -> Iterator[Finding]:
    """Whatever a configuration asks for beyond A and B."""
    config = subject.config
    magnitudes = [key for key in subject.others if "lora_magnitude_vector" in key]
    if config.get("use_dora") or magnitudes:
        detail = "use_dora is set" if config.get("use_dora") else f"{magnitudes[0]!r} is there"
        yield from _say("dora", magnitudes or ["use_dora"], detail)
    b_biases = [key for key in subject.others if bias_of(key) == "lora"]
    if config.get("lora_bias") or b_biases:
        detail = "lora_bias is set" if config.get("lora_bias") else f"{b_biases[0]!r} is there"
        yield from _say("lora-bias", b_biases or ["lora_bias"], detail)
    biases = [key for key in subject.others if bias_of(key) == "module"]
    bias = config.get("bias", "none")
    if bias not in (None, "none", "") or biases:
        detail = f"{biases[0]!r} is there" if biases else f"bias is {bias!r}"
        yield from _say("bias", biases or ["bias"], detail)
    names = saved_modules(config)
    code = "modules-to-save-head" if set(names) <= _HEADS else "modules-to-save"
    yield from _say(code, names, f"modules_to_save has {names[0]!r}" if names else "")


def saved_modules(config: Mapping[str, Any]) -> list[str]:
    """The names in ``modules_to_save``, whatever form it has."""
    saved = config.get("modules_to_save") or []
    return [str(name) for name in saved] if isinstance(saved, list) else [str(saved)]


def bias_of(key: str) -> Literal["lora", "module"] | None:
    """Whose bias a tensor is: that of a ``lora_B``, that of a base module, or no bias at all."""
    if not key.endswith(".bias"):
        return None
    return "lora" if re.search(r"\.lora_[AB](\.[^.]+)?\.bias$", key) else "module"


def _others(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    init = config.get("init_lora_weights")
    if isinstance(init, str) and not init.lower().startswith(_VLLM_INITS):
        detail = f"init_lora_weights is {init!r}"
        yield from _say("init-weights", ["init_lora_weights"], detail)
    for code, fields in (("variant", _VARIANTS), ("variant-unread", _UNREAD_VARIANTS)):
        used = [name for name in fields if _is_used(config.get(name))]
        yield from _say(code, used, f"{used[0]} is set" if used else "")
    parameters = config.get("target_parameters") or []
    detail = "target_parameters is set"
    wheres = ["target_parameters"] if _is_used(parameters) else []
    # Engines do not read the field; the tensors that go with it are looked at by their keys.
    yield from _say("target-parameters", wheres, detail, certain=False)
    unknown = sorted(set(map(str, config)) - PEFT_FIELDS)
    yield from _say("field-unknown", unknown, f"{unknown[0]!r} is there" if unknown else "")
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        detail = f"base_model_name_or_path is {name!r}"
        yield from _say("base-name-missing", ["base_model_name_or_path"], detail)


def _is_used(value: Any) -> bool:
    return value not in (None, False, "", [], {})
