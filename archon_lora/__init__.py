"""LoRA core for the Archon engine, and for any model made of ``nn.Linear``.

Names are imported when they are first used, so that a program without LoRA imports none of its code
with the package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .adapter import (
        AdapterModule,
        AppliedLoRA,
        get_adapter_params,
        get_adapter_state_dict,
        set_trainable_params,
    )
    from .adapters import adapter_names, add_adapter, copy_adapter, remove_adapter
    from .apply import apply_lora, initialise_adapters
    from .config import LoRAConfig
    from .errors import (
        AdapterMismatch,
        AdapterModeError,
        AdapterNotFound,
        ArchonLoraError,
        EngineNotReady,
        LoRAConfigError,
        LoRANotEnabled,
        MergeError,
        ModelLoadError,
        NoAdapterError,
        NonFiniteGradient,
        ParallelConfigError,
        PeerFailed,
        TargetError,
        TrainConfigError,
        UnmappedName,
    )
    from .experts import LoRAGroupedExperts
    from .linear import LoRALinear
    from .merge import iter_merged_weights
    from .mode import (
        adapter_mode,
        adapters_disabled,
        disable_adapter,
        enable_adapter,
        set_active,
    )
    from .names import canonical_fqn
    from .parallel import (
        LoRAColwiseParallel,
        LoRARowwiseParallel,
        adapter_shard_placement,
    )
    from .peft import load_adapter_tensors, peft_export

_HOMES = {
    "AdapterMismatch": "errors",
    "AdapterModeError": "errors",
    "AdapterModule": "adapter",
    "AdapterNotFound": "errors",
    "AppliedLoRA": "adapter",
    "ArchonLoraError": "errors",
    "EngineNotReady": "errors",
    "LoRAColwiseParallel": "parallel",
    "LoRAConfig": "config",
    "LoRAConfigError": "errors",
    "LoRAGroupedExperts": "experts",
    "LoRALinear": "linear",
    "LoRANotEnabled": "errors",
    "LoRARowwiseParallel": "parallel",
    "MergeError": "errors",
    "ModelLoadError": "errors",
    "NoAdapterError": "errors",
    "NonFiniteGradient": "errors",
    "ParallelConfigError": "errors",
    "PeerFailed": "errors",
    "TargetError": "errors",
    "TrainConfigError": "errors",
    "UnmappedName": "errors",
    "adapter_mode": "mode",
    "adapter_names": "adapters",
    "adapter_shard_placement": "parallel",
    "adapters_disabled": "mode",
    "add_adapter": "adapters",
    "apply_lora": "apply",
    "canonical_fqn": "names",
    "copy_adapter": "adapters",
    "disable_adapter": "mode",
    "enable_adapter": "mode",
    "get_adapter_params": "adapter",
    "get_adapter_state_dict": "adapter",
    "initialise_adapters": "apply",
    "iter_merged_weights": "merge",
    "load_adapter_tensors": "peft",
    "peft_export": "peft",
    "remove_adapter": "adapters",
    "set_active": "mode",
    "set_trainable_params": "adapter",
}

__all__ = [
    "AdapterMismatch",
    "AdapterModeError",
    "AdapterModule",
    "AdapterNotFound",
    "AppliedLoRA",
    "ArchonLoraError",
    "EngineNotReady",
    "LoRAColwiseParallel",
    "LoRAConfig",
    "LoRAConfigError",
    "LoRAGroupedExperts",
    "LoRALinear",
    "LoRANotEnabled",
    "LoRARowwiseParallel",
    "MergeError",
    "ModelLoadError",
    "NoAdapterError",
    "NonFiniteGradient",
    "ParallelConfigError",
    "PeerFailed",
    "TargetError",
    "TrainConfigError",
    "UnmappedName",
    "adapter_mode",
    "adapter_names",
    "adapter_shard_placement",
    "adapters_disabled",
    "add_adapter",
    "apply_lora",
    "canonical_fqn",
    "copy_adapter",
    "disable_adapter",
    "enable_adapter",
    "get_adapter_params",
    "get_adapter_state_dict",
    "initialise_adapters",
    "iter_merged_weights",
    "load_adapter_tensors",
    "peft_export",
    "remove_adapter",
    "set_active",
    "set_trainable_params",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f".{home}", __name__), name)


def _version() -> str:
    """That of the installed distribution, which pyproject.toml alone declares."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("archon-lora")
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
