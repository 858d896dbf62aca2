"""LoRA core for the Archon engine, and for any model made of ``nn.Linear``."""

from __future__ import annotations

from .adapter import (
    AdapterModule,
    AppliedLoRA,
    adapters_disabled,
    disable_adapter,
    enable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    set_trainable_params,
)
from .apply import apply_lora, initialise_adapters
from .config import LoRAConfig
from .errors import (
    AdapterMismatch,
    AdapterNotFound,
    ArchonLoraError,
    LoRAConfigError,
    LoRANotEnabled,
    ModelLoadError,
    NoAdapterError,
    TargetError,
    UnmappedName,
)
from .linear import LoRALinear
from .merge import iter_merged_weights
from .names import canonical_fqn
from .parallel import adapter_shard_placement
from .peft import load_adapter_tensors, peft_export

__all__ = [
    "AdapterMismatch",
    "AdapterModule",
    "AdapterNotFound",
    "AppliedLoRA",
    "ArchonLoraError",
    "LoRAConfig",
    "LoRAConfigError",
    "LoRALinear",
    "LoRANotEnabled",
    "ModelLoadError",
    "NoAdapterError",
    "TargetError",
    "UnmappedName",
    "adapter_shard_placement",
    "adapters_disabled",
    "apply_lora",
    "canonical_fqn",
    "disable_adapter",
    "enable_adapter",
    "get_adapter_params",
    "get_adapter_state_dict",
    "initialise_adapters",
    "iter_merged_weights",
    "load_adapter_tensors",
    "peft_export",
    "set_trainable_params",
]
