"""torchtune's adapters: ``adapter_model.pt`` (or ``adapter_<N>.pt``) in torchtune's own names.

Where torchtune also wrote ``adapter_config.json`` and weights in PEFT's form, that is a PEFT
directory already, and read as one. Its own file says neither alpha nor the model: these come from
the caller and from the base model's ``config.json``.

torchtune keeps the two halves of a rotary pair next to each other, HuggingFace in two halves, so
the rows of B of the query and key projections change places (the same change that turns
HuggingFace's weights into Meta's, backwards), in families whose torchtune weights are so permuted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.errors import ConfigError, DamagedError, StateError
from ckpt.peft import CONFIG_NAME

from .torch_file import TorchFile
from .torch_pickle import StoredView

FILE: Final = re.compile(r"adapter_(?:model|\d+)\.pt")
_KEY: Final = re.compile(r"(layers\.(\d+)\.(?:attn|mlp)\.(\w+)|output)\.lora_([ab])\.weight")
_MODULES: Final[Mapping[str, str]] = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "output_proj": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
_PERMUTED: Final = frozenset({"llama", "mistral"})
_PLAIN: Final = frozenset({"qwen2", "qwen3"})
"""Model types whose query and key weights torchtune keeps as HuggingFace has them."""
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class _Heads:
    """How the rows of the query and key projections are arranged."""

    queries: int
    keys: int
    dim: int
    permuted: bool


def find_torchtune(directory: Path) -> Path | None:
    """The adapter's file, given itself or a directory with exactly one."""
    if directory.is_file():
        return directory if FILE.fullmatch(directory.name) else None
    if not directory.is_dir():
        return None
    found = sorted(p for p in directory.iterdir() if FILE.fullmatch(p.name))
    if len(found) > 1:
        msg = f"{directory} holds {', '.join(p.name for p in found)}; name one of the files"
        raise ConfigError(msg)
    return found[0] if found else None


def read_torchtune(
    path: Path, *, alpha: float | None, base_config: Path | None
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A torchtune adapter in PEFT's form.

    Args:
        path: the file.
        alpha: numerator of the scaling, as the recipe had it; the file does not say it. By default
            that of an ``adapter_config.json`` beside it.
        base_config: ``config.json`` of the base model; by default the one beside the file.

    Returns:
        The content of ``adapter_config.json``, and the tensors by PEFT key.

    Raises:
        ConfigError: alpha or the base's configuration is missing, or the model's family is not
            one whose layout is known.
        StateError: a tensor that is no A or B of a known layer, or a class that is not read.
        DamagedError: the file does not parse.
    """
    alpha = _written_alpha(path.parent) if alpha is None else alpha
    if alpha is None or not alpha > 0:
        msg = f"{path} does not say alpha; give the recipe's: --alpha 16"
        raise ConfigError(msg)
    heads = _heads(base_config or path.parent / "config.json")
    file = TorchFile(path)
    try:
        if not isinstance(file.value, dict):
            raise DamagedError(f"{path} holds a {type(file.value).__name__}, want a dictionary")
        strange = [k for k, v in file.value.items() if not _is_factor(k, v)]
        if strange:
            shown = ", ".join(map(str, strange[:_SHOWN]))
            msg = f"{path}: {shown}: no A or B of a layer that is known here; nothing was read"
            raise StateError(msg)
        tensors: dict[str, torch.Tensor] = {}
        modules: dict[str, int] = {}
        for name, view in file.value.items():
            module, side, tensor = _converted(name, file.tensor(view), heads, path)
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = tensor
            rank = tensor.shape[0 if side == "A" else 1]
            if modules.setdefault(module, rank) != rank:
                raise StateError(f"{path}: A and B of {module} have different ranks")
    finally:
        file.close()
    ranks = sorted(set(modules.values()))
    if len(ranks) != 1:
        raise StateError(f"{path}: modules have the ranks {ranks}; torchtune adapters have one")
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": ranks[0],
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
    }
    return config, tensors


def _written_alpha(folder: Path) -> float | None:
    """``lora_alpha`` of torchtune's own configuration, where it wrote one."""
    try:
        config = json.loads((folder / CONFIG_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedError(f"{folder / CONFIG_NAME} is not JSON: {error}") from error
    value = config.get("lora_alpha") if isinstance(config, dict) else None
    return float(value) if isinstance(value, int | float) else None


def _is_factor(name: Any, value: Any) -> bool:
    match = _KEY.fullmatch(name) if isinstance(name, str) else None
    known = match is not None and (match[1] == "output" or match[3] in _MODULES)
    return known and isinstance(value, StoredView) and len(value.shape) == 2


def _converted(
    name: str, tensor: torch.Tensor, heads: _Heads, path: Path
) -> tuple[str, str, torch.Tensor]:
    match = _KEY.fullmatch(name)
    assert match is not None  # noqa: S101 - _is_factor() has looked
    side = match[4].upper()
    if match[1] == "output":
        return "lm_head", side, tensor
    module = f"model.layers.{match[2]}.{_MODULES[match[3]]}"
    count = {"q_proj": heads.queries, "k_proj": heads.keys}.get(match[3])
    if count is None or side == "A" or not heads.permuted:
        return module, side, tensor
    rows, rank = tensor.shape
    if rows != count * heads.dim:
        msg = (
            f"{path}: {name} has {rows} rows, {count} heads of {heads.dim} want {count * heads.dim}"
        )
        raise StateError(msg)
    pairs = tensor.view(count, heads.dim // 2, 2, rank)
    return module, side, pairs.transpose(1, 2).reshape(rows, rank)


def _heads(path: Path) -> _Heads:
    """Head counts and size, from the base model's configuration."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"no {path}: name the base model's config.json: --base-config PATH"
        raise ConfigError(msg) from error
    except ValueError as error:
        raise DamagedError(f"{path} is not JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _PERMUTED | _PLAIN:
        known = ", ".join(sorted(_PERMUTED | _PLAIN))
        msg = f"{path}: model_type {kind!r}: the layout is known for {known} alone"
        raise ConfigError(msg)
    queries, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    keys = config.get("num_key_value_heads") or queries
    counts = (queries, keys, hidden)
    if not all(type(count) is int and count > 0 for count in counts):
        msg = f"{path}: head counts and size must be integers, got {counts!r}"
        raise ConfigError(msg)
    dim = config.get("head_dim") or hidden // queries
    return _Heads(queries, keys, dim, kind in _PERMUTED)
