"""What can be done with every adapter of a model.

The protocol of modules with adapters is :mod:`archon_lora.protocol`, switching between adapters
:mod:`archon_lora.mode`; their names can be imported from here too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .config import LoRAConfig
from .errors import AdapterMismatch, LoRANotEnabled, NoAdapterError, TargetError
from .frozen import FrozenMap
from .mode import adapter_mode, adapters_disabled, disable_adapter, enable_adapter, set_active
from .names import DEFAULT_ADAPTER, REFERENCE_ADAPTER, canonical_fqn, canonical_parameters
from .placement import reshard
from .protocol import (
    AdapterModule,
    NamedAdapters,
    SwitchableAdapter,
    adapter_modules,
    names_in,
    params_in,
)

__all__ = [
    "DEFAULT_ADAPTER",
    "REFERENCE_ADAPTER",
    "AdapterModule",
    "AppliedLoRA",
    "NamedAdapters",
    "SwitchableAdapter",
    "adapter_mode",
    "adapter_modules",
    "adapters_disabled",
    "applied_lora",
    "disable_adapter",
    "enable_adapter",
    "gather",
    "get_adapter_params",
    "get_adapter_state_dict",
    "set_active",
    "set_trainable_params",
]


@dataclass(frozen=True)
class AppliedLoRA:
    """What was put into a model, and where.

    Attributes:
        config: the settings.
        matched: HF module name of every adapted module, by its canonical FQN.
        experts: HF names of the adapted projections of stacked experts, one for each expert, by the
            canonical FQN of their stack.
        module_names: HF names of all modules of the model at that time; an export needs them to
            choose target names that select exactly the adapted ones.
        hf_names: HF name by canonical FQN of every module of the model at that time, the root
            left out.
        others: the records of further adapters by name, filled by ``add_adapter()``; empty in
            those records themselves.
        whole: of a pipeline stage, the whole model without values (see
            :mod:`archon_lora.stages`); ``matched`` and ``experts`` are those of the stage then.
    """

    config: LoRAConfig
    matched: FrozenMap[str]
    module_names: tuple[str, ...]
    hf_names: FrozenMap[str]
    others: dict[str, AppliedLoRA] = field(default_factory=dict, compare=False)
    experts: FrozenMap[tuple[str, ...]] = field(default_factory=lambda: FrozenMap({}))
    whole: nn.Module | None = field(default=None, compare=False)

    def target_names(self) -> tuple[str, ...]:
        """HF names of everything adapted, experts one by one."""
        return (*self.matched.values(), *itertools.chain(*self.experts.values()))


def applied_lora(model: nn.Module, adapter: str = DEFAULT_ADAPTER) -> AppliedLoRA:
    """The record that ``apply_lora()`` or ``add_adapter()`` left, found through any wrappers.

    Args:
        model: any tree.
        adapter: whose record.

    Raises:
        LoRANotEnabled: there is none at all.
        NoAdapterError: there is none of that name.
    """
    for module in model.modules():
        record = module.__dict__.get("lora")
        if isinstance(record, AppliedLoRA):
            if adapter == DEFAULT_ADAPTER:
                return record
            if adapter in record.others:
                return record.others[adapter]
            has = ", ".join(map(repr, (DEFAULT_ADAPTER, *record.others)))
            msg = f"the model has no adapter {adapter!r}; it has {has}"
            raise NoAdapterError(msg)
    msg = "this model has no LoRA: call apply_lora(model, LoRAConfig(...)) on it before sharding"
    raise LoRANotEnabled(msg)


def require_whole(model: nn.Module, what: str) -> None:
    """Refuse a model whose parameters are shards already, or registered with DDP.

    Raises:
        TargetError: says what must come first.
    """
    if isinstance(model, DistributedDataParallel):
        msg = f"{what} must run before DistributedDataParallel, which has registered gradients"
        raise TargetError(msg)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            msg = f"{what} must run before sharding, but parameter {name!r} is a DTensor"
            raise TargetError(msg)


def get_adapter_params(
    model: nn.Module, *, adapter: str | None = None, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """Adapter parameters of a model; those of FSDP2 as shards, whatever ran before.

    Args:
        model: any tree: plain, sharded, wrapped by activation checkpointing, compile or DDP.
        adapter: only those of the adapter of this name; by default those of every adapter that
            trains (all but the ones added with ``trainable=False``).
        frozen: those of the frozen adapters, too.

    Returns:
        Parameters by canonical FQN, in the order of the modules; empty without adapters.

    Raises:
        NoAdapterError: no module has an adapter of that name.
        AdapterMismatch: a module names a parameter that it does not have, or holds one that
            requires a gradient and that no adapter module names (it would train unsaved).
    """
    reshard(model)
    found: dict[str, nn.Parameter] = {}
    trainable: dict[str, str] = {}
    claimed: set[str] = set()
    for name, module in adapter_modules(model):
        prefix = f"{name}." if name else ""
        kind = f"{type(module).__name__} {name!r}"
        # A Protocol with runtime checks says nothing about being a module; the walk does.
        own = {canonical_fqn(n): p for n, p in module.named_parameters()}  # type: ignore[attr-defined]
        training = module.adapter_params()
        claimed.update(prefix + local for local in training)
        if adapter is not None:
            wanted = params_in(module, adapter)
        else:
            wanted = training
            if frozen:
                every = (local for n in names_in(module) for local in params_in(module, n))
                wanted = list(dict.fromkeys([*training, *every]))
        for local in [*training, *wanted]:
            if local not in own:
                msg = (
                    f"{kind} names the adapter parameter {local!r}, "
                    f"which it does not have; it has {', '.join(own) or 'none'}"
                )
                raise AdapterMismatch(msg)
        found.update((prefix + local, own[local]) for local in wanted)
        trainable |= {prefix + n: kind for n, p in own.items() if p.requires_grad}
    unclaimed = [name for name in trainable if name not in claimed]
    if unclaimed:
        msg = (
            f"parameter {unclaimed[0]!r} requires a gradient, but {trainable[unclaimed[0]]} does "
            "not name it in adapter_params(): it would train and never be saved"
        )
        raise AdapterMismatch(msg)
    if adapter is not None and not found:
        msg = f"no module of the model has an adapter {adapter!r}"
        raise NoAdapterError(msg)
    return found


def set_trainable_params(model: nn.Module, names: Iterable[str]) -> None:
    """Let exactly these parameters require a gradient.

    Args:
        model: any tree.
        names: canonical FQNs; the mapping from :func:`get_adapter_params` will do.

    Raises:
        NoAdapterError: no names at all: nothing would train.
        AdapterMismatch: a name that is no parameter of the model.
    """
    wanted = {canonical_fqn(name) for name in names}
    if not wanted:
        msg = "no parameter was named: nothing would train; apply_lora() comes first"
        raise NoAdapterError(msg)
    reshard(model)
    parameters = dict(canonical_parameters(model))
    unknown = sorted(wanted - parameters.keys())
    if unknown:
        msg = f"not parameters of the model: {', '.join(unknown)}"
        raise AdapterMismatch(msg)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in wanted)


def get_adapter_state_dict(
    model: nn.Module, *, full: bool = False, adapter: str | None = None
) -> dict[str, Tensor]:
    """The values of adapter parameters.

    Args:
        model: any tree with adapters.
        adapter: only those of the adapter of this name; by default as :func:`get_adapter_params`.
        full: gather shards and copy to the CPU. Collective over the mesh of each parameter: every
            rank must call, and every rank gets all values.

    Returns:
        By canonical FQN, in the order of the modules: with ``full`` new contiguous CPU tensors,
        else the live ones, detached (DTensors stay DTensors).

    Raises:
        NoAdapterError: the model has no adapters.
        AdapterMismatch: as :func:`get_adapter_params`.
    """
    parameters = get_adapter_params(model, adapter=adapter)
    if not parameters:
        msg = "the model has no adapter parameters: apply_lora() was not called on it"
        raise NoAdapterError(msg)
    if not full:
        return {name: parameter.detach() for name, parameter in parameters.items()}
    return {name: gather(parameter) for name, parameter in parameters.items()}


@torch.no_grad()
def gather(tensor: Tensor) -> Tensor:
    """A whole, contiguous copy on the CPU; collective over the mesh of a DTensor."""
    whole = tensor.detach()
    if isinstance(whole, DTensor):
        whole = whole.full_tensor()
    return whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
