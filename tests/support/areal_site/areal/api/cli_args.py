"""A stand-in for AReaL's configuration: the fields that its engine reads, as far as they matter."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class OptimizerConfig:
    lr: float = 1e-2


@dataclass
class TrainEngineConfig:
    experiment_name: str = "e"
    trial_name: str = "t"
    path: str = ""
    dtype: str = "float32"
    is_critic: bool = False
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    weight_update_mode: str = "xccl"
    use_lora: bool = False
    lora_rank: int = 32
    lora_alpha: int = 16
    target_modules: list[str] = field(default_factory=list)
    peft_type: str = "lora"
