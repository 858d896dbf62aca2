"""Models that HuggingFace's PEFT has wrapped: what a checkpoint of one needs to know.

PEFT is never imported here: a model can only be one of its models if the program has imported it.

In such a model a factor is called ``base_model.model.<module>.lora_A.<adapter>.weight``, and a
checkpoint calls it just so, with the adapter's name in it, since a model may hold several. Files
that PEFT saves, and exports, leave the adapter's name out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import nn

from .errors import ConfigError, NotExportable
from .fqn import walk
from .peft_config import check_plain, rank_of, scaling_of
from .types import AdapterExport, TensorRule

_FACTORS: Final = ("lora_A", "lora_B")
_RANK_DIM: Final = {"lora_A": 0, "lora_B": 1}
_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class _Factor:
    """One A or B: its name in the checkpoint, in PEFT's file, and the module it adapts."""

    fqn: str
    key: str
    module: str
    side: str


def find_peft_model(model: nn.Module) -> nn.Module | None:
    """The PEFT model that this is or holds, below any wrapper; None if there is none.

    Raises:
        ConfigError: there are several.
    """
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    found = [module for module in model.modules() if isinstance(module, peft.PeftModel)]
    if len(found) > 1:
        msg = f"{type(model).__name__} holds {len(found)} PEFT models; pass the export of one"
        raise ConfigError(msg)
    return found[0] if found else None


def export_of_peft(
    model: nn.Module, adapter: str | None = None, *, normalise: bool | None = None
) -> AdapterExport:
    """How an adapter of a PEFT model is written, as ``save_pretrained`` would write it.

    Args:
        model: a PEFT model, or one that holds it: wrapped by DDP, sharded by FSDP2, compiled, or
            with a head beside it.
        adapter: its name; by default the active one.
        normalise: write it in the form that PEFT, vLLM and SGLang compute alike: one rank
            (zero-padded), ``alpha = r``, scaling folded into B, no rsLoRA and no patterns. By
            default only where the adapter has rsLoRA or patterns, which engines ignore or refuse;
            everything else is written exactly as it is.

    Returns:
        The export of that adapter; the tensors of the model's other adapters are its ``others``.

    Raises:
        ConfigError: no PEFT model, or no such adapter.
        NotExportable: several adapters are active, or it is more than ``scaling * B A`` on linear
            layers (DoRA, biases, ``modules_to_save``, embeddings, another method than LoRA).
    """
    peft_model = find_peft_model(model)
    if peft_model is None:
        msg = f"{type(model).__name__} neither is nor holds a PEFT model (get_peft_model)"
        raise ConfigError(msg)
    name = _chosen(peft_model, adapter)
    config = _config(peft_model, name)
    where = f"adapter {name!r} of the PEFT model"
    try:
        check_plain(config, where)
    except ConfigError as error:
        raise NotExportable(str(error)) from error
    factors, others = _factors(model, peft_model, name)
    if not factors:
        msg = f"{where} has no {' or '.join(_FACTORS)}: nothing of it can be exported"
        raise NotExportable(msg)
    patterned = any(config.get(k) for k in ("use_rslora", "rank_pattern", "alpha_pattern"))
    if not (patterned if normalise is None else normalise):
        rules = [TensorRule(factor.fqn, factor.key) for factor in factors]
        return AdapterExport(config, tuple(rules), tuple(others))
    widest = max(rank_of(config, factor.module) for factor in factors)
    serving = config | {"r": widest, "lora_alpha": widest, "use_rslora": False}
    serving |= {"rank_pattern": {}, "alpha_pattern": {}}
    rules = [_normalised(factor, config, widest) for factor in factors]
    return AdapterExport(serving, tuple(rules), tuple(others))


def _normalised(factor: _Factor, config: Mapping[str, Any], widest: int) -> TensorRule:
    scale = scaling_of(config, factor.module) if factor.side == "lora_B" else 1.0
    if not math.isfinite(scale):
        msg = f"the scaling of {factor.module} is {scale!r}"
        raise ConfigError(msg)
    if rank_of(config, factor.module) == widest:
        return TensorRule(factor.fqn, factor.key, scale)
    return TensorRule(factor.fqn, factor.key, scale, _RANK_DIM[factor.side], widest)


def _chosen(peft_model: Any, adapter: str | None) -> str:
    known = list(peft_model.peft_config)
    if adapter is None:
        active = list(peft_model.active_adapters)
        if len(active) != 1:
            msg = f"{len(active)} adapters are active ({', '.join(active)}); name the one to export"
            raise NotExportable(msg)
        adapter = active[0]
    if adapter not in known:
        msg = f"the PEFT model has no adapter {adapter!r}; it has {', '.join(known)}"
        raise ConfigError(msg)
    return str(adapter)


def _config(peft_model: Any, name: str) -> dict[str, Any]:
    """Content of ``adapter_config.json`` as ``save_pretrained`` would write it, as plain JSON."""
    raw: Mapping[str, Any] = peft_model.peft_config[name].to_dict()
    config = {key: _plain(value) for key, value in raw.items()} | {"inference_mode": True}
    if config.get("base_model_name_or_path") is None:
        base = peft_model.get_base_model()
        config["base_model_name_or_path"] = getattr(base, "name_or_path", None) or None
    return config


def _plain(value: Any) -> Any:
    """Sets in a fixed order, enumerations as their text, mappings as dictionaries."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return str(value.value) if isinstance(getattr(value, "value", None), str) else value


def _factors(model: nn.Module, peft_model: nn.Module, name: str) -> tuple[list[_Factor], list[str]]:
    """The adapter's factors in model order, and what other adapters hold.

    Raises:
        NotExportable: the adapter has parts that are no A or B of a layer.
    """
    root = next(path for path, module in walk(model) if module is peft_model)
    factors: list[_Factor] = []
    others: list[str] = []
    strange: list[str] = []
    for fqn, container, adapter, rest in _adapter_parameters(model):
        if adapter != name:
            others.append(fqn)
            continue
        inner = container.removeprefix(f"{root}.") if root else container
        layer, _, side = inner.rpartition(".")
        if side not in _FACTORS or rest != "weight":
            strange.append(fqn)
            continue
        module = layer.removeprefix("base_model.model.")
        factors.append(_Factor(fqn, f"{inner}.weight", module, side))
    if strange:
        msg = (
            f"adapter {name!r} of the PEFT model holds {', '.join(strange[:_SHOWN])}, which is no "
            "A or B of a linear layer; only those are exported"
        )
        raise NotExportable(msg)
    return factors, others


def _adapter_parameters(model: nn.Module) -> Iterator[tuple[str, str, str, str]]:
    """(canonical FQN, container's FQN, adapter, what follows) of all that PEFT's layers hold."""
    containers: set[str] = set()
    for path, module in walk(model):
        names = getattr(type(module), "adapter_layer_names", ())
        if isinstance(names, tuple) and hasattr(module, "active_adapters"):
            containers.update(f"{path}.{n}" for n in names if n in module._modules)
        for local, _ in module.named_parameters(recurse=False):
            fqn = f"{path}.{local}" if path else local
            above = _container_of(path, containers)
            if above is not None:
                adapter, _, rest = fqn.removeprefix(f"{above}.").partition(".")
                yield fqn, above, adapter, rest


def _container_of(path: str, containers: set[str]) -> str | None:
    """The container that a module lies in, or is."""
    while path:
        if path in containers:
            return path
        path = path.rpartition(".")[0]
    return None
