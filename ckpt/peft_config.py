"""PEFT keys and configurations: the grammar, and what an export must satisfy.

Pure: no file is read or written here.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch

from .errors import ConfigError
from .types import AdapterExport, TensorRule

EXPORT_DTYPES: Final[Mapping[str, tuple[torch.dtype, str]]] = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
}
"""Dtypes an adapter may be written in: our name to (torch dtype, safetensors code)."""

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<rows>[AB]))"
)

_NAMED_KEY = re.compile(
    r"(?P<head>.*\.lora_(?:embedding_)?[AB])\.(?P<adapter>[^.]+)(?P<tail>\.weight)"
)


def plain_key(key: str) -> str:
    """A key without the adapter's name, as PEFT saves it (``lora_A.default.weight`` has one)."""
    match = _NAMED_KEY.fullmatch(key)
    return match["head"] + match["tail"] if match else key


def split_key(key: str) -> tuple[str, str]:
    """Take a PEFT key apart.

    Args:
        key: ``base_model.model.<module>.lora_A.weight`` or ``….lora_B.weight``; of an embedding
            ``….lora_embedding_A`` or ``….lora_embedding_B``.

    Returns:
        The module's name and ``"A"`` or ``"B"``.

    Raises:
        ConfigError: any other key; engines ignore or refuse those.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        msg = (
            f"PEFT key {key!r} is not of the form "
            "'base_model.model.<module>.lora_A.weight' (or lora_B)"
        )
        raise ConfigError(msg)
    return match["module"], match["linear"] or match["rows"]


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that a configuration gives a module.

    The first ``rank_pattern`` entry that matches wins: PEFT tries each as the whole name or as a
    dotted suffix of it, and takes ``r`` when none does.
    """
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return int(rank)
    return int(config["r"])


def scaling_of(config: Mapping[str, Any], module: str) -> float:
    """The factor by which PEFT multiplies ``B A`` of a module.

    ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``; patterns are matched as for
    :func:`rank_of`.
    """
    alpha = float(config["lora_alpha"])
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = float(value)
            break
    rank = rank_of(config, module)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


PLAIN_FIELDS: Final = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Fields of PEFT's configuration that a plain ``scaling * B A`` may have set."""

_OFF: Final[tuple[Any, ...]] = (None, False, "none", "", [], {})
_BASE_CHANGING: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_plain(config: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that computes anything else than ``scaling * B A``.

    Args:
        config: content of ``adapter_config.json``, not trusted.
        where: the file's path, for the message.

    Raises:
        ConfigError: names the field, what it holds and why that cannot be taken over.
    """
    try:
        _check_config(config)
    except ConfigError as error:
        text = str(error).removeprefix("peft_config.")
        raise ConfigError(f"{where}: {text}") from error
    for name, value in config.items():
        if name in PLAIN_FIELDS or any(type(value) is type(o) and value == o for o in _OFF):
            continue
        msg = f"{where}: {name}={value!r} makes it another computation than plain LoRA"
        if name == "target_parameters":
            msg = (
                f"{where}: {name}={value!r}: its experts are stacked; export them one by one (ckpt "
                "export --experts single), or load it with load_lora_adapter()"
            )
        raise ConfigError(msg)
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING):
        msg = (
            f"{where}: init_lora_weights={init!r} changed the base weights; convert the adapter to "
            "a plain one first (PEFT: path_initial_model_for_weight_conversion)"
        )
        raise ConfigError(msg)


def check_export(export: AdapterExport) -> None:
    """Refuse an export that some loader would refuse, or worse, take in part.

    Args:
        export: PEFT configuration and rules, as a manifest carries them.

    Raises:
        ConfigError: names the field or key, what it holds and what is wanted.
    """
    if not export.rules:
        raise ConfigError("the adapter export has no rules, so it would write an empty adapter")
    _check_config(export.peft_config)
    sides: dict[str, dict[str, TensorRule]] = {}
    for rule in export.rules:
        module, side = split_key(rule.key)
        pair = sides.setdefault(module, {})
        if side in pair:
            raise ConfigError(f"two export rules make the same PEFT key {rule.key!r}")
        pair[side] = rule
        _check_rule(rule)
    both = sorted({rule.source for rule in export.rules}.intersection(export.others))
    if both:
        raise ConfigError(f"{both[0]!r} is exported and said to be another adapter's")
    for module, pair in sides.items():
        if len(pair) != 2:
            (have,) = pair
            want = "B" if have == "A" else "A"
            msg = f"module {module!r} has lora_{have} but no lora_{want}; export both"
            raise ConfigError(msg)
    _check_targets(export.peft_config, sorted(sides))


def _check_config(config: Mapping[str, Any]) -> None:
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise ConfigError(f"peft_config.peft_type must be 'LORA', got {peft_type!r}")
    ranks = {"r": config.get("r"), **_patterns(config, "rank_pattern")}
    for where, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise ConfigError(f"peft_config.{where} must be an integer >= 1, got {rank!r}")
    alphas = {"lora_alpha": config.get("lora_alpha"), **_patterns(config, "alpha_pattern")}
    for where, alpha in alphas.items():
        number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        # Compared, not converted: an integer may be too large for a float.
        if not number or not 0 < alpha < math.inf or alpha > sys.float_info.max:
            raise ConfigError(f"peft_config.{where} must be a finite number > 0, got {alpha!r}")
    if config.get("use_dora"):
        raise ConfigError("peft_config.use_dora is set; only plain LoRA (A and B) is exported")
    if config.get("lora_bias") or config.get("bias", "none") != "none":
        raise ConfigError("peft_config asks for biases; only A and B weights are exported")
    if config.get("modules_to_save"):
        modules = config["modules_to_save"]
        msg = (
            f"peft_config.modules_to_save={modules!r} cannot be exported: engines drop or refuse it"
        )
        raise ConfigError(msg)


def _patterns(config: Mapping[str, Any], field: str) -> dict[str, Any]:
    patterns = config.get(field) or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"peft_config.{field} must map patterns to numbers, got {patterns!r}")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            msg = f"peft_config.{field} has {pattern!r}, which is no regular expression: {error}"
            raise ConfigError(msg) from error
    return {f"{field}[{pattern!r}]": value for pattern, value in patterns.items()}


def _check_rule(rule: TensorRule) -> None:
    if not math.isfinite(rule.scale) or rule.scale == 0:
        msg = f"the rule for {rule.key!r} has scale {rule.scale!r}; want a finite number, not 0"
        raise ConfigError(msg)
    if (rule.pad_dim is None) != (rule.pad_to is None):
        msg = f"the rule for {rule.key!r} must set pad_dim and pad_to together, or neither"
        raise ConfigError(msg)


def _check_targets(config: Mapping[str, Any], modules: Sequence[str]) -> None:
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets:
        if targets == "all-linear":
            return
        try:
            pattern = re.compile(targets)
        except re.error as error:
            msg = f"peft_config.target_modules {targets!r} is no regular expression: {error}"
            raise ConfigError(msg) from error
        lost = [name for name in modules if pattern.fullmatch(name) is None]
    elif isinstance(targets, Sequence | set | frozenset) and targets:
        lost = [
            name
            for name in modules
            if not any(name == target or name.endswith(f".{target}") for target in targets)
        ]
    else:
        msg = f"peft_config.target_modules must be a non-empty list or a string, got {targets!r}"
        raise ConfigError(msg)
    if lost:
        msg = (
            f"peft_config.target_modules {targets!r} does not cover {lost[0]!r}"
            f" ({len(lost)} module(s) in all): PEFT would load the adapter without it"
        )
        raise ConfigError(msg)


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """``adapter_config.json`` with every order fixed: equal configurations give equal bytes.

    Args:
        config: the PEFT configuration; sets of names are written as sorted lists.

    Raises:
        ConfigError: a value that JSON cannot hold.
    """
    plain = {
        key: sorted(value) if isinstance(value, set | frozenset) else value
        for key, value in config.items()
    }
    for key in ("target_modules", "exclude_modules"):
        if isinstance(plain.get(key), list | tuple):
            plain[key] = sorted(plain[key])
    try:
        text = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the PEFT configuration is not JSON: {error}") from error
    return text.encode() + b"\n"
