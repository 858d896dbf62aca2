"""apply_lora(): put adapters into a model, freeze the rest, remember what was done."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .adapter import (
    AdapterModule,
    AppliedLoRA,
    adapter_modules,
    get_adapter_params,
    set_trainable_params,
)
from .bases import check_base
from .candidates import (
    check_candidate,
    check_targetable,
    other_layers,
    output_names,
    owners_of,
    untargetable,
)
from .config import LoRAConfig, check_config
from .embedding import LoRAEmbedding
from .errors import NoAdapterError, TargetError
from .expert_targets import by_stack, chosen_stacks, expert_names, stack_settings
from .experts import LoRAGroupedExperts
from .frozen import FrozenMap
from .linear import LoRALinear
from .names import canonical_modules
from .peft import peft_export
from .placement import reshard
from .targets import match_targets

_log = logging.getLogger(__name__)

NameMap = Callable[[str], str | None] | Mapping[str, str | None]
"""HF module name by canonical FQN; None, or no entry, keeps the FQN."""


@runtime_checkable
class ResettableAdapter(AdapterModule, Protocol):
    """An adapter module that can write its initial values."""

    def reset_adapter(self) -> None:
        """Write the initial values into the adapter's parameters."""
        ...


def apply_lora(
    model: nn.Module,
    config: LoRAConfig,
    *,
    name_map: NameMap | None = None,
    base_model_name: str = "",
) -> AppliedLoRA:
    """Put adapters on the targeted linear layers and experts, and freeze everything else.

    A linear layer is replaced by a LoRALinear, an embedding that a name or a regular expression
    selects by a LoRAEmbedding. Experts that lie stacked
    (:class:`archon_lora.expert_targets.StackedExperts`) are targeted by the names that HuggingFace
    gives the linear layers of each, and replaced by LoRAGroupedExperts.

    Call it once, on the bare model, before tensor parallelism, ``fully_shard``, DDP or an
    optimizer; on a meta-device model :func:`initialise_adapters` follows after ``to_empty``.
    Nothing is changed unless everything can be done.

    The model gets two attributes: ``lora``, the returned record, and ``adapter_export``, a call
    that gives the PEFT config and export rules (see :func:`archon_lora.peft.peft_export`).

    Args:
        model: any tree of modules.
        config: what to adapt.
        name_map: for a model whose names are not HuggingFace's: HF module name by FQN.
        base_model_name: what published adapters call the base model.

    Returns:
        What matched.

    Raises:
        LoRAConfigError: ``config`` is no LoRAConfig.
        TargetError: the model is sharded, wrapped by DDP or adapted already, an entry matches
            nothing, or a matched module cannot take an adapter.
    """
    check_config(config)
    _check_model(model)
    modules = dict(canonical_modules(model))
    hf_names = _hf_names(list(modules), name_map)
    by_hf = {hf: fqn for fqn, hf in hf_names.items()}
    refused = untargetable(modules, hf_names)
    stacked = expert_names(modules, hf_names)
    one_by_one = [hf for names in stacked for stack in names.stacks.values() for hf in stack]
    everything = tuple(dict.fromkeys([*hf_names.values(), *refused, *one_by_one]))
    linear = {hf_names[n] for n, m in modules.items() if n and isinstance(m, nn.Linear)}
    try:
        selected = match_targets(
            config,
            everything,
            linear_names={*linear, *one_by_one},
            output_names=output_names(model, modules, hf_names),
        )
    except TargetError as error:
        raise TargetError(f"{error}{other_layers(model, modules)}") from error
    check_targetable(selected, refused)
    grouped = chosen_stacks(stacked, frozenset(selected))
    settings = stack_settings(config, grouped)
    chosen = tuple(hf for hf in selected if hf in by_hf)
    owners = owners_of(model)
    for hf in chosen:
        check_candidate(modules, by_hf[hf], hf, owners)
    experts = {
        fqn: LoRAGroupedExperts(modules[fqn], config, targets, fqn=fqn)
        for fqn, targets in settings.items()
    }
    layers = {hf: _layer(modules[by_hf[hf]], config, hf=hf, fqn=by_hf[hf]) for hf in chosen}
    paths = {id(module): path for path, module in model.named_modules()}
    for hf, layer in layers.items():
        model.set_submodule(paths[id(modules[by_hf[hf]])], layer)
    for fqn, adapted in experts.items():
        model.set_submodule(paths[id(modules[fqn])], adapted)
    claimed = {by_hf[hf]: layer for hf, layer in layers.items()} | experts
    set_trainable_params(
        model, [f"{n}.{p}" for n, m in claimed.items() for p in m.adapter_params()]
    )
    record = AppliedLoRA(
        config=config,
        matched=FrozenMap({by_hf[hf]: hf for hf in chosen}),
        hf_names=FrozenMap(hf_names),
        module_names=everything,
        experts=FrozenMap(by_stack(grouped)),
    )
    model.lora = record  # type: ignore[assignment]  # modules take any attribute at run time
    # A partial, not a closure: copy.deepcopy(model) then binds the copy, not the original.
    export = functools.partial(peft_export, model, base_model_name=base_model_name)
    model.adapter_export = export  # type: ignore[assignment]
    trained = sum(p.numel() for p in get_adapter_params(model).values())
    _log.info(
        "LoRA on %d modules, %d trainable parameters: %s",
        len(selected),
        trained,
        # Experts are too many to be named one by one.
        ", ".join([*chosen, *(f"{fqn} ({len(hf)} experts)" for fqn, hf in record.experts.items())]),
    )
    return record


def initialise_adapters(model: nn.Module) -> None:
    """Write the initial values of every adapter; the base is not touched.

    For models built on the meta device: after ``to_empty``, before or after loading the base.
    Needs no communication; every rank writes its slice of the same global values.

    Raises:
        NoAdapterError: there are no adapters, one cannot be reset, or one is still on meta.
    """
    found = list(adapter_modules(model))
    if not found:
        msg = "the model has no adapters: apply_lora() was not called on it"
        raise NoAdapterError(msg)
    for name, module in found:
        if not isinstance(module, ResettableAdapter):
            msg = f"{type(module).__name__} {name!r} has adapter parameters but no reset_adapter()"
            raise NoAdapterError(msg)
    reshard(model)
    for _, module in found:
        if isinstance(module, ResettableAdapter):
            module.reset_adapter()


def _check_model(model: nn.Module) -> None:
    if isinstance(model, DistributedDataParallel):
        msg = "apply_lora() must run before DistributedDataParallel, which has registered gradients"
        raise TargetError(msg)
    if isinstance(model, nn.Linear):
        msg = (
            "the model itself is a linear layer, which cannot be replaced in place; use "
            "LoRALinear.from_linear()"
        )
        raise TargetError(msg)
    for name, _ in adapter_modules(model):
        msg = f"the model has an adapter already ({name!r}); apply_lora() works once"
        raise TargetError(msg)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            msg = f"apply_lora() must run before sharding, but parameter {name!r} is a DTensor"
            raise TargetError(msg)
    for attribute in ("lora", "adapter_export"):
        if hasattr(model, attribute):
            msg = f"the model has an attribute {attribute!r} of its own, which apply_lora() sets"
            raise TargetError(msg)


def _hf_names(fqns: list[str], name_map: NameMap | None) -> dict[str, str]:
    """HF name by FQN, the root left out; two modules must not share one."""
    lookup: Callable[[str], str | None]
    if name_map is None:
        lookup = dict[str, str | None]().get
    else:
        lookup = name_map.get if isinstance(name_map, Mapping) else name_map
    names: dict[str, str] = {}
    taken: dict[str, str] = {}
    for fqn in fqns:
        if not fqn:
            continue
        hf = lookup(fqn)
        names[fqn] = fqn if hf is None else hf
        other = taken.setdefault(names[fqn], fqn)
        if other != fqn:
            msg = f"name_map gives both {other!r} and {fqn!r} the HF name {names[fqn]!r}"
            raise TargetError(msg)
    return names


def _layer(
    module: nn.Module, config: LoRAConfig, *, hf: str, fqn: str
) -> LoRALinear | LoRAEmbedding:
    if isinstance(module, nn.Embedding):
        return LoRAEmbedding(module, config, hf=hf, fqn=fqn)
    return LoRALinear.from_linear(
        check_base(module, hf),
        rank=config.rank_for(hf),
        alpha=config.alpha_for(hf),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        init=config.init,
        adapter_dtype=config.adapter_dtype,
        fqn=fqn,
        seed=config.seed,
    )
