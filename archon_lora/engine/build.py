"""From a HuggingFace directory to a sharded, adapted, loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from archon_lora.errors import ParallelConfigError
from archon_lora.models import BaseStateDictAdapter, get_model_spec, load_hf_weights
from archon_lora.models.hf_files import read_config
from archon_lora.models.parallel_dims import ParallelMesh

from .config import EngineConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model that is ready to train, and what describes it."""

    model: nn.Module
    model_config: object
    state_dict_adapter: BaseStateDictAdapter


def build_model(config: EngineConfig, mesh: ParallelMesh, device: torch.device) -> BuiltModel:
    """Build on the meta device, adapt, shard, materialise, load, in that order.

    Adapters go in before sharding, so that FSDP places them, and get their values after
    materialising, which would overwrite them. Their values depend on seed and name alone, so every
    topology starts from the same bits.

    Args:
        config: model directory, dtype, adapter, recomputation and compilation.
        mesh: how the ranks are laid out.
        device: where the shards go.

    Returns:
        The model in training mode.

    Raises:
        ModelLoadError: the directory cannot be loaded.
        TargetError: the adapter's targets do not fit the model.
        ParallelConfigError: the layout does not fit the model.
    """
    if mesh.pp is not None:
        msg = f"parallel.pp={mesh.dims.pp}: this engine does not split a model into stages"
        raise ParallelConfigError(msg)
    raw = read_config(Path(config.path))
    spec = get_model_spec(str(raw.get("model_type")))
    model_config = spec.config_cls.from_hf(raw)
    names = spec.state_dict_adapter_cls(model_config)
    dtype = DTYPES[config.dtype]
    with torch.device("meta"):
        model = spec.model_cls(model_config)
    model.to(dtype)
    if config.lora is not None:
        from archon_lora.apply import apply_lora

        from .reference import add_reference

        apply_lora(model, config.lora, name_map=names.module_to_hf)
        if config.reference == "warm-start":
            add_reference(model, config.lora)
    spec.parallelize_fn(
        model,
        mesh,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        compile_backend=config.compile_backend or "inductor",
        # fp32 needs no mixed precision; over bf16 the fp32 adapters are gathered and multiplied
        # in bf16, and their gradients reduced in fp32.
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
    )
    model.to_empty(device=device)
    load_hf_weights(model, names, config.path)
    if config.lora is not None:
        from archon_lora.apply import initialise_adapters

        initialise_adapters(model)
    return BuiltModel(model.train(), model_config, names)


def trainable_params(model: nn.Module, *, has_lora: bool) -> list[nn.Parameter]:
    """What the optimizer updates: the adapter's parameters, or all of them without LoRA.

    Raises:
        NoAdapterError: LoRA is on, but the model has no adapter.
    """
    if not has_lora:
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    from archon_lora.adapter import get_adapter_params
    from archon_lora.errors import NoAdapterError

    if params := list(get_adapter_params(model).values()):
        return params
    msg = f"LoRA is on, but {type(model).__name__} has no adapter parameters"
    raise NoAdapterError(msg)
