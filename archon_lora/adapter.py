"""The AdapterModule protocol, and what can be done with every adapter of a model.

Adapters are found by protocol, never by a substring of a name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import LoRAConfig
from .errors import AdapterMismatch, LoRANotEnabled, NoAdapterError
from .frozen import FrozenMap
from .names import canonical_fqn, canonical_modules, canonical_parameters, unwrap_ddp
from .placement import reshard


@runtime_checkable
class AdapterModule(Protocol):
    """A module that holds adapter parameters."""

    def adapter_params(self) -> list[str]:
        """Names, relative to the module, of the parameters that belong to the adapter."""
        ...


@runtime_checkable
class SwitchableAdapter(AdapterModule, Protocol):
    """An adapter module that can compute its base alone."""

    disabled: bool

    def enable(self) -> None:
        """Let forward use the adapter."""
        ...

    def disable(self) -> None:
        """Let forward compute the base alone."""
        ...


@dataclass(frozen=True)
class AppliedLoRA:
    """What was put into a model, and where.

    Attributes:
        config: the settings.
        matched: HF module name of every adapted module, by its canonical FQN.
        module_names: HF names of all modules of the model at that time; an export needs them to
            choose target names that select exactly the adapted ones.
    """

    config: LoRAConfig
    matched: FrozenMap[str]
    module_names: tuple[str, ...]


def applied_lora(model: nn.Module) -> AppliedLoRA:
    """The record that ``apply_lora()`` left, found through any wrappers.

    Raises:
        LoRANotEnabled: there is none.
    """
    for module in model.modules():
        record = module.__dict__.get("lora")
        if isinstance(record, AppliedLoRA):
            return record
    msg = "this model has no LoRA: call apply_lora(model, LoRAConfig(...)) on it before sharding"
    raise LoRANotEnabled(msg)


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Every module that follows the protocol, under its canonical name."""
    for name, module in canonical_modules(model):
        if isinstance(module, AdapterModule):
            yield name, module


def get_adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """All adapter parameters of a model; those of FSDP2 as shards, whatever ran before.

    Args:
        model: any tree: plain, sharded, wrapped by activation checkpointing, compile or DDP.

    Returns:
        Parameters by canonical FQN, in the order of the modules; empty without adapters.

    Raises:
        AdapterMismatch: a module names a parameter that it does not have, or holds one that
            requires a gradient and that no adapter module names (it would train unsaved).
    """
    reshard(model)
    found: dict[str, nn.Parameter] = {}
    trainable: dict[str, str] = {}
    for name, module in adapter_modules(model):
        prefix = f"{name}." if name else ""
        # A Protocol with runtime checks says nothing about being a module; the walk does.
        own = {canonical_fqn(n): p for n, p in module.named_parameters()}  # type: ignore[attr-defined]
        for local in module.adapter_params():
            if local not in own:
                msg = (
                    f"{type(module).__name__} {name!r} names the adapter parameter {local!r}, "
                    f"which it does not have; it has {', '.join(own) or 'none'}"
                )
                raise AdapterMismatch(msg)
            found[prefix + local] = own[local]
        for local, parameter in own.items():
            if parameter.requires_grad:
                trainable[prefix + local] = f"{type(module).__name__} {name!r}"
    unclaimed = [name for name in trainable if name not in found]
    if unclaimed:
        msg = (
            f"parameter {unclaimed[0]!r} requires a gradient, but {trainable[unclaimed[0]]} does "
            "not name it in adapter_params(): it would train and never be saved"
        )
        raise AdapterMismatch(msg)
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


def get_adapter_state_dict(model: nn.Module, *, full: bool = False) -> dict[str, Tensor]:
    """The values of all adapter parameters.

    Args:
        model: any tree with adapters.
        full: gather shards and copy to the CPU. Collective over the mesh of each parameter: every
            rank must call, and every rank gets all values.

    Returns:
        By canonical FQN, in the order of the modules: with ``full`` new contiguous CPU tensors,
        else the live ones, detached (DTensors stay DTensors).

    Raises:
        NoAdapterError: the model has no adapters.
        AdapterMismatch: as :func:`get_adapter_params`.
    """
    parameters = get_adapter_params(model)
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


def disable_adapter(model: nn.Module) -> None:
    """Let every adapted module compute its base alone.

    Raises:
        NoAdapterError: there are no adapters, or one that cannot be switched.
    """
    for module in _switchable(model):
        module.disable()


def enable_adapter(model: nn.Module) -> None:
    """Let every adapted module use its adapter.

    Raises:
        NoAdapterError: there are no adapters, or one that cannot be switched.
    """
    for module in _switchable(model):
        module.enable()


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within the block the model is the frozen base: a reference without a second copy.

    At the end, after an exception too, each module gets back the state it had, so blocks nest
    and single modules that were disabled before stay so.

    Yields:
        Nothing.

    Raises:
        NoAdapterError: there are no adapters, or one that cannot be switched.
    """
    modules = _switchable(model)
    before = [module.disabled for module in modules]
    try:
        for module in modules:
            module.disable()
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            if disabled:
                module.disable()
            else:
                module.enable()


def _switchable(model: nn.Module) -> list[SwitchableAdapter]:
    modules = []
    for name, module in adapter_modules(model):
        if not isinstance(module, SwitchableAdapter):
            msg = (
                f"{type(module).__name__} {name!r} holds adapter parameters but has no "
                "enable(), disable() and disabled: the base model cannot be computed"
            )
            raise NoAdapterError(msg)
        modules.append(module)
    if not modules:
        kind = type(unwrap_ddp(model)).__name__
        msg = f"the model ({kind}) has no adapters: apply_lora() was not called on it"
        raise NoAdapterError(msg)
    return modules
