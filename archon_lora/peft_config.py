"""The fields of PEFT's ``adapter_config.json``: which are read, ignored and refused.

The field list is that of ``peft.LoraConfig`` 0.21 (a frozen public format: files of earlier
releases use a subset of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import LoRAConfigError

PEFT_VERSION = "0.21.2"
"""Release of PEFT whose file format is written; stamped as ``peft_version`` in exports.

The layout of some adapters changed between releases, and readers choose by this field. It is a
constant because the core needs no PEFT installed; the parity tests run against this release.
"""

READ = frozenset(
    {
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
        "init_lora_weights",
        "task_type",
    }
)
"""Fields whose values are used."""

IGNORED = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "inference_mode",
        "megatron_core",  # the import path of an optional backend, never used by itself
        "qalora_group_size",  # read only with use_qalora, which is refused
        "runtime_config",
    }
)
"""Fields that say where an adapter came from, not what it computes."""

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA's row norms need whole rows, and serving engines reject it",
    "bias": "trained biases change the base model, so that it is no reference any more",
    "modules_to_save": "fully trained modules are dropped or rejected by serving engines",
    "lora_bias": "a bias on lora_B is ignored or rejected by serving engines",
    "layer_replication": "replicated layers change the model itself",
    "layers_to_transform": "select layers with a regular expression in target_modules instead",
    "layers_pattern": "select layers with a regular expression in target_modules instead",
    "fan_in_fan_out": "only nn.Linear, whose weight is (out, in), takes an adapter",
    "target_parameters": "name the linear layers of single experts in target_modules instead",
    "trainable_token_indices": "retrained rows of an embedding are another computation than LoRA",
    "ensure_weight_tying": "tied weights take no adapter",
    "megatron_config": "Megatron's parallel layers are not supported",
    "loftq_config": "LoftQ changes the base weights",
    "corda_config": "CorDA changes the base weights",
    "eva_config": "data-driven initialisation is not supported",
    "lora_ga_config": "LoRA-GA changes the base weights",
    "velora_config": "VeLoRA is another computation than LoRA",
    "kasa_config": "KaSA is another computation than LoRA",
    "monteclora_config": "MonteCLoRA is another computation than LoRA",
    "arrow_config": "Arrow routes between several adapters",
    "alora_invocation_tokens": "activated LoRA is another computation than LoRA",
    "use_qalora": "QA-LoRA is another computation than LoRA",
    "use_bdlora": "BD-LoRA is another computation than LoRA",
}
"""Fields that must stay at their "off" value, with the reason."""

_OFF: tuple[Any, ...] = (None, False, "none", "", [], (), {})


def is_off(value: object) -> bool:
    """Whether a field holds one of the values with which PEFT says "not used"."""
    return any(type(value) is type(off) and value == off for off in _OFF)


def check_fields(config: Any) -> None:
    """Refuse what cannot be computed as PEFT would compute it.

    Fields this list does not know are accepted while they are off, since newer releases of PEFT
    write every new option into each file; set to anything else they are refused.

    Args:
        config: content of ``adapter_config.json``, a mapping.

    Raises:
        LoRAConfigError: not a mapping, not LoRA, or an option is set that is not supported.
    """
    if not isinstance(config, Mapping):
        msg = f"a PEFT config must be a mapping, got {type(config).__name__}"
        raise LoRAConfigError(msg)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.rpartition(".")[2].upper() != "LORA":
        msg = f"peft_type must be 'LORA', got {kind!r}"
        raise LoRAConfigError(msg)
    for name, value in config.items():
        if name in READ or name in IGNORED or is_off(value):
            continue
        if name in REFUSED:
            msg = f"{name}={value!r} is not supported: {REFUSED[name]}"
        else:
            msg = (
                f"unknown PEFT field {name!r}={value!r}: what it computes is not known here "
                f"(fields of PEFT {PEFT_VERSION} are known)"
            )
        raise LoRAConfigError(msg)
