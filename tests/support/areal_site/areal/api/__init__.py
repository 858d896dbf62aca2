"""A stand-in for AReaL's records: the fields that an engine reads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class SaveLoadMeta:
    path: str
    weight_format: str
    with_optim: bool
    tokenizer: Any = None
    processor: Any = None
    base_model_path: str | None = None
    naive_distributed: bool = False


@dataclass
class WeightUpdateMeta:
    type: str
    path: str | None = None
    use_lora: bool = False
    lora_name: str = ""
    clear_checkpoint_after_load: bool = True
    version: int | None = None

    def with_version(self, version: int) -> WeightUpdateMeta:
        changed = copy.copy(self)
        changed.version = version
        assert self.path is not None
        changed.path = str(Path(self.path).parent / f"weight_update_v{version}")
        return changed


@dataclass
class FinetuneSpec:
    total_train_steps: int = 10
    steps_per_epoch: int = 10


@dataclass
class TrainEngineConfig:
    """The fields of AReaL's that its Archon engine reads, as far as they matter here."""

    path: str
    experiment_name: str = "e"
    trial_name: str = "t"
    dtype: str = "float32"
    is_critic: bool = False
    use_lora: bool = False
    lora_rank: int = 32
    lora_alpha: int = 16
    target_modules: Any = ()
    peft_type: str = "lora"
    lr: float = 1e-2
