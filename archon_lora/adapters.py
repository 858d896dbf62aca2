"""Several named adapters over one base: adding, removing and copying them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .adapter import AppliedLoRA, applied_lora, get_adapter_params, require_whole
from .bases import check_base
from .candidates import check_candidate, check_targetable, output_names, owners_of, untargetable
from .config import LoRAConfig, check_config
from .embedding import EmbeddingPair, LoRAEmbedding
from .errors import AdapterMismatch, LoRAConfigError, NoAdapterError
from .expert_targets import by_stack, chosen_stacks, expert_names, stack_settings
from .experts import LoRAGroupedExperts
from .factors import LoRAPair
from .frozen import FrozenMap
from .linear import LoRALinear
from .mode import RESERVED_NAMES
from .names import DEFAULT_ADAPTER, canonical_modules
from .placement import reshard
from .protocol import adapter_modules
from .targets import match_targets

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def add_adapter(
    model: nn.Module, name: str, config: LoRAConfig, *, trainable: bool = True
) -> AppliedLoRA:
    """Put one more adapter over the base of a model that has been through ``apply_lora()``.

    Call it before tensor parallelism, ``fully_shard``, DDP or an optimizer, like ``apply_lora()``;
    on a meta-device model :func:`archon_lora.initialise_adapters` gives it its values, too.
    Nothing is changed unless everything can be done. The default adapter stays the active one.

    Rank, alpha, targets and dtype may differ from those of the other adapters. A module that the
    adapter leaves out computes its base alone while the adapter is active. The parameters are
    called ``<module>.adapters.<name>.lora_a.weight`` and ``.lora_b.weight``; those of experts
    ``<module>.adapters.<name>.w1_lora_a`` and so on.

    Args:
        model: any tree of modules.
        name: letters, digits, ``_`` and ``-``, at most 64; ``"reference"`` is what
            ``adapter_mode(model, "reference")`` computes with.
        config: what to adapt.
        trainable: whether it trains. A frozen adapter is not in :func:`get_adapter_params`, so no
            optimizer gets it, but checkpoints hold it.

    Returns:
        What matched.

    Raises:
        LoRAConfigError: the name is taken or cannot be one, or ``config`` is no LoRAConfig.
        LoRANotEnabled: ``apply_lora()`` was not called.
        TargetError: the model is sharded or wrapped by DDP, an entry matches nothing, or a
            matched module cannot take an adapter.
    """
    record = applied_lora(model)
    _check_name(model, name)
    require_whole(model, "add_adapter()")
    modules = {n: m for n, m in canonical_modules(model) if n in record.hf_names}
    found, grouped = _match(model, modules, record, config)
    settings = stack_settings(config, grouped)
    owners = owners_of(model)
    for fqn, hf in found.matched.items():
        if not isinstance(modules[fqn], LoRALinear | LoRAEmbedding):
            check_candidate(modules, fqn, hf, owners)
    holders = {fqn: _holder(modules[fqn], fqn) for fqn in found.matched}
    paths = {id(module): path for path, module in model.named_modules()}
    for fqn, holder in holders.items():
        if holder is not modules[fqn]:
            model.set_submodule(paths[id(modules[fqn])], holder)
        _put(holder, name, config, hf=found.matched[fqn], trainable=trainable)
    for fqn, targets in settings.items():
        experts = modules[fqn]
        if not isinstance(experts, LoRAGroupedExperts):
            experts = LoRAGroupedExperts(experts, config, {}, fqn=fqn)
            model.set_submodule(paths[id(modules[fqn])], experts)
        experts.add_adapter(name, config, targets, trainable=trainable)
    record.others[name] = found
    return found


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter that :func:`add_adapter` put in out again.

    Args:
        model: the model, not yet sharded: FSDP2 goes on managing a parameter that is gone.
        name: the adapter; not the default one. If it is active, the default one becomes so.

    Raises:
        NoAdapterError: there is no such adapter, or it is the default one.
        TargetError: the model is sharded or wrapped by DDP.
    """
    record = applied_lora(model)
    if name not in record.others:
        has = ", ".join(map(repr, record.others)) or "none"
        msg = f"no adapter {name!r} was added to this model; added were: {has}"
        raise NoAdapterError(msg)
    require_whole(model, "remove_adapter()")
    for _, module in list(adapter_modules(model)):
        if isinstance(module, LoRALinear | LoRAEmbedding | LoRAGroupedExperts):
            if name in module.adapter_names():
                module.drop_adapter(name)
            if module.active == name:
                module.activate(DEFAULT_ADAPTER)
    del record.others[name]


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Every adapter of a model: the default one, then the others in the order they were added.

    Raises:
        LoRANotEnabled: ``apply_lora()`` was not called.
    """
    return (DEFAULT_ADAPTER, *applied_lora(model).others)


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Give one adapter the values of another, of the same shape; for sharded models too.

    No communication: each rank copies its part, so every rank must call. Everything is checked
    before anything is written.

    Args:
        model: the model.
        source: name of the adapter that is read.
        target: name of the one that is written.

    Raises:
        NoAdapterError: there is no such adapter.
        AdapterMismatch: they differ in modules, rank, scaling or placement.
    """
    reshard(model)
    plan: list[tuple[Tensor, Tensor]] = []
    pair = f"adapter {source!r} cannot be copied to {target!r}"
    values, slots = (
        {_slot(n, name): p for n, p in get_adapter_params(model, adapter=name).items()}
        for name in (source, target)
    )
    if values.keys() != slots.keys():
        odd = sorted(values.keys() ^ slots.keys())
        msg = f"{pair}: only one of them has {', '.join(odd[:4])}{', ...' if odd[4:] else ''}"
        raise AdapterMismatch(msg)
    for name, slot in slots.items():
        value = values[name]
        if value.shape != slot.shape or _placed(value) != _placed(slot):
            msg = (
                f"{pair}: {name} is {tuple(value.shape)} {_placed(value) or ''} in one and "
                f"{tuple(slot.shape)} {_placed(slot) or ''} in the other"
            )
            raise AdapterMismatch(msg)
        plan.append((slot, value))
    for fqn, module in adapter_modules(model):
        if isinstance(module, LoRALinear | LoRAEmbedding | LoRAGroupedExperts):
            if source not in module.adapter_names():
                continue
            theirs, ours = _scalings(module, source), _scalings(module, target)
            if theirs != ours:
                msg = f"{pair}: at {fqn} the scaling is {theirs} in one, {ours} in the other"
                raise AdapterMismatch(msg)
    for target_part, source_part in plan:
        target_part.copy_(source_part)


def _scalings(module: LoRALinear | LoRAEmbedding | LoRAGroupedExperts, adapter: str) -> str:
    if isinstance(module, LoRALinear | LoRAEmbedding):
        return f"{module.adapter_of(adapter).scaling:g}"
    held = module.adapter_of(adapter).scalings
    return ", ".join(f"{scaling:g} ({stack})" for stack, scaling in sorted(held.items()))


def _slot(name: str, adapter: str) -> str:
    """The parameter's name without the part that says whose it is."""
    return name.replace(f".adapters.{adapter}.", ".", 1)


def _placed(tensor: Tensor) -> object:
    return tensor.placements if isinstance(tensor, DTensor) else None


def _match(
    model: nn.Module, modules: Mapping[str, nn.Module], record: AppliedLoRA, config: LoRAConfig
) -> tuple[AppliedLoRA, dict[str, dict[str, tuple[str, ...]]]]:
    """What the adapter is for, among the modules that there were when the first one came.

    Returns:
        Its record, and the stacks of experts that it is for.
    """
    check_config(config)
    by_hf = {hf: fqn for fqn, hf in record.hf_names.items() if fqn in modules}
    refused = untargetable(modules, record.hf_names)
    stacked = expert_names(modules, record.hf_names)
    one_by_one = {hf for names in stacked for stack in names.stacks.values() for hf in stack}
    linear = {record.hf_names[n] for n, m in modules.items() if isinstance(m, nn.Linear)}
    chosen = match_targets(
        config,
        record.module_names,
        linear_names=linear | one_by_one,
        output_names=output_names(model, modules, record.hf_names),
    )
    check_targetable(chosen, refused)
    grouped = chosen_stacks(stacked, frozenset(chosen))
    found = AppliedLoRA(
        config=config,
        matched=FrozenMap({by_hf[hf]: hf for hf in chosen if hf in by_hf}),
        module_names=record.module_names,
        hf_names=record.hf_names,
        experts=FrozenMap(by_stack(grouped)),
    )
    return found, grouped


def _check_name(model: nn.Module, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = f"an adapter's name must be letters, digits, '_' or '-', at most 64, got {name!r}"
        raise LoRAConfigError(msg)
    if name in RESERVED_NAMES or hasattr(nn.ModuleDict, name):
        msg = f"an adapter cannot be called {name!r}: the name has a meaning of its own"
        raise LoRAConfigError(msg)
    if name in adapter_names(model):
        msg = f"the model has an adapter {name!r} already"
        raise LoRAConfigError(msg)


def _holder(module: nn.Module, fqn: str) -> LoRALinear | LoRAEmbedding:
    """What can hold one more adapter: the module itself, or a new one to take its place."""
    if isinstance(module, LoRALinear | LoRAEmbedding):
        return module
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding.without_default(module, fqn=fqn)
    return LoRALinear.without_default(check_base(module, fqn), fqn=fqn)


def _put(
    holder: LoRALinear | LoRAEmbedding, name: str, config: LoRAConfig, *, hf: str, trainable: bool
) -> None:
    fqn = f"{holder.fqn}.adapters.{name}"
    if isinstance(holder, LoRAEmbedding):
        made = EmbeddingPair(holder, config, hf=hf, fqn=fqn, trainable=trainable)
        holder.put_adapter(name, made)
    else:
        holder.put_adapter(name, _pair(holder, config, hf=hf, fqn=fqn, trainable=trainable))


def _pair(layer: LoRALinear, config: LoRAConfig, *, hf: str, fqn: str, trainable: bool) -> LoRAPair:
    pair = LoRAPair(
        layer.in_features,
        layer.out_features,
        rank=config.rank_for(hf),
        alpha=config.alpha_for(hf),
        scaling=config.scaling_for(hf),
        dropout=config.dropout,
        init=config.init,
        adapter_dtype=config.adapter_dtype,
        device=layer.weight.device,
        fqn=fqn,
        seed=config.seed,
        trainable=trainable,
    )
    if layer.weight.device.type != "meta":
        pair.reset()
    return pair
