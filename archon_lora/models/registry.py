"""Which classes make up a model family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from torch import nn

from archon_lora.errors import ModelLoadError

from .base import BaseStateDictAdapter
from .qwen2.config import Qwen2Config
from .qwen2.model import Qwen2Model
from .qwen2.parallelize import parallelize as parallelize_qwen2
from .qwen2.state_dict_adapter import Qwen2StateDictAdapter


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


_SPECS: Mapping[str, ModelSpec] = {
    spec.model_type: spec
    for spec in (
        ModelSpec(
            model_type="qwen2",
            config_cls=Qwen2Config,
            model_cls=Qwen2Model,
            state_dict_adapter_cls=Qwen2StateDictAdapter,
            parallelize_fn=parallelize_qwen2,
        ),
    )
}


def get_model_spec(model_type: str) -> ModelSpec:
    """The parts of a model family.

    Args:
        model_type: ``model_type`` of a ``config.json``.

    Raises:
        ModelLoadError: no such family here; the message lists those that are.
    """
    spec = _SPECS.get(model_type)
    if spec is None:
        msg = f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(_SPECS))}"
        raise ModelLoadError(msg)
    return spec
