"""From a HuggingFace directory to a sharded, adapted, loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from archon_lora.errors import ParallelConfigError
from archon_lora.models import BaseStateDictAdapter, get_model_spec, load_hf_weights
from archon_lora.models.decoder import Decoder
from archon_lora.models.hf_files import read_config
from archon_lora.models.parallel_dims import ParallelMesh
from archon_lora.models.pipeline import split_decoder

from .config import EngineConfig
from .passes import Passes, WholeModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model that is ready to train, and what describes it.

    Attributes:
        parts: the model, or this rank's pipeline stages.
        passes: forward and backward through them.
        model_config: the model's own configuration.
        state_dict_adapter: its names.
        vocab_size: width of its logits.
        dtype: of its logits.
    """

    parts: tuple[nn.Module, ...]
    passes: Passes
    model_config: object
    state_dict_adapter: BaseStateDictAdapter
    vocab_size: int
    dtype: torch.dtype


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

        apply_lora(
            model,
            config.lora,
            name_map=names.module_to_hf,
            base_model_name=config.base_name or config.path,
        )
        if config.reference == "warm-start":
            add_reference(model, config.lora)
    parts = [model]
    if mesh.pp is not None:
        parts = _stages(model, mesh.pp, config.pp_stages)
    del model
    for part in parts:
        spec.parallelize_fn(
            part,
            mesh,
            activation_checkpointing=config.activation_checkpointing,
            compile=config.compile,
            compile_backend=config.compile_backend or "inductor",
            # fp32 needs no mixed precision; over bf16 the fp32 adapters are gathered and
            # multiplied in bf16, and their gradients reduced in fp32.
            param_dtype=None if dtype == torch.float32 else dtype,
            reduce_dtype=torch.float32,
        )
        part.to_empty(device=device)
        load_hf_weights(part, names, config.path)
        if config.lora is not None:
            from archon_lora.apply import initialise_adapters
            from archon_lora.protocol import adapter_modules

            if any(True for _ in adapter_modules(part)):  # a stage may have none
                initialise_adapters(part)
        part.train()
    passes: Passes = WholeModel(parts[0])
    if mesh.pp is not None:
        from .pipeline import Pipeline

        passes = Pipeline(
            parts,
            mesh.pp.get_group(),
            device,
            dtype=dtype,
            hidden=raw["hidden_size"],
            schedule=config.pp_schedule,
        )
    return BuiltModel(tuple(parts), passes, model_config, names, raw["vocab_size"], dtype)


def _stages(model: nn.Module, mesh: DeviceMesh, each: int) -> list[nn.Module]:
    """This rank's stages: every ``mesh.size()``-th one."""
    if not isinstance(model, Decoder):
        msg = f"a {type(model).__name__} cannot be split into pipeline stages; set parallel.pp=1"
        raise ParallelConfigError(msg)
    size = mesh.size()
    return list(split_decoder(model, size * each, range(mesh.get_local_rank(), size * each, size)))


def trainable_params(parts: Sequence[nn.Module], *, has_lora: bool) -> list[nn.Parameter]:
    """What the optimizer updates: the adapter's parameters, or all of them without LoRA.

    Of pipeline stages it may be nothing at all: others have the adapter then.

    Raises:
        NoAdapterError: LoRA is on, but a whole model has no adapter.
    """
    if not has_lora:
        return [p for part in parts for p in part.parameters() if p.requires_grad]
    from archon_lora.adapter import applied_lora, get_adapter_params
    from archon_lora.errors import NoAdapterError

    params = [p for part in parts for p in get_adapter_params(part).values()]
    if params or applied_lora(parts[0]).whole is not None:
        return params
    msg = f"LoRA is on, but {type(parts[0]).__name__} has no adapter parameters"
    raise NoAdapterError(msg)
