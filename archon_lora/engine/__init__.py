"""The engine: a small trainer on FSDP2, and how its weights are saved, loaded and handed over.

Names are imported when they are first used: an engine without LoRA must not import LoRA's code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig, OptimizerConfig
    from .engine import ArchonEngine
    from .grad_norm import clip_grad_norm
    from .lora_checkpoint import (
        is_lora_adapter_checkpoint,
        load_lora_adapter,
        save_lora_adapter,
        warm_start,
    )
    from .reference import keep_reference
    from .types import EngineLike, FullWeightSink, SaveLoadMeta, WeightSink

_HOMES = {
    "ArchonEngine": "engine",
    "EngineConfig": "config",
    "EngineLike": "types",
    "FullWeightSink": "types",
    "OptimizerConfig": "config",
    "SaveLoadMeta": "types",
    "WeightSink": "types",
    "clip_grad_norm": "grad_norm",
    "is_lora_adapter_checkpoint": "lora_checkpoint",
    "keep_reference": "reference",
    "load_lora_adapter": "lora_checkpoint",
    "save_lora_adapter": "lora_checkpoint",
    "warm_start": "lora_checkpoint",
}

__all__ = [
    "ArchonEngine",
    "EngineConfig",
    "EngineLike",
    "FullWeightSink",
    "OptimizerConfig",
    "SaveLoadMeta",
    "WeightSink",
    "clip_grad_norm",
    "is_lora_adapter_checkpoint",
    "keep_reference",
    "load_lora_adapter",
    "save_lora_adapter",
    "warm_start",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
