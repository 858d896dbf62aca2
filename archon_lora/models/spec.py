"""What a model family has to bring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from torch import nn

from .base import BaseStateDictAdapter


class ModelConfig(Protocol):
    """A model's hyperparameters."""

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> Self:
        """Read them from a model directory or a parsed ``config.json``."""
        ...


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The parts of one model family.

    Attributes:
        model_type: ``model_type`` of the family's ``config.json``.
        config_cls: its hyperparameters, with ``from_hf``.
        model_cls: the module; takes the configuration, constructible on the meta device.
        state_dict_adapter_cls: its names; takes the configuration.
        parallelize_fn: recomputation, compilation and sharding, in place: ``(model, mesh, *,
            activation_checkpointing, compile, param_dtype, reduce_dtype, reshard_after_forward)``.
    """

    model_type: str
    config_cls: type[ModelConfig]
    model_cls: type[nn.Module]
    state_dict_adapter_cls: type[BaseStateDictAdapter]
    parallelize_fn: Callable[..., nn.Module]
