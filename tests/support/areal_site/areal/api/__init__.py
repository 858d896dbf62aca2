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
    total_train_epochs: int
    dataset_size: int
    train_batch_size: int

    @property
    def total_train_steps(self) -> int:
        return self.total_train_epochs * (self.dataset_size // self.train_batch_size)


@dataclass
class ParallelStrategy:
    data_parallel_size: int = 1
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
