"""PEFT's adapter format: keys, ``adapter_config.json``, export rules, and loading.

PEFT spells the factors ``lora_A`` and ``lora_B`` and prefixes module names with
``base_model.model.``; in the model they are ``lora_a`` and ``lora_b``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from .adapter import applied_lora, get_adapter_params
from .config import LoRAConfig
from .errors import AdapterMismatch, LoRAConfigError, UnmappedName
from .names import DEFAULT_ADAPTER
from .peft_config import check_fields
from .peft_keys import PEFT_PREFIX, Factor, is_embedding_key, parse_peft_key, peft_key
from .placement import copy_local_, local_slice, reshard
from .sites import AdapterSite, adapter_sites
from .stacked import StackedAdapter, TensorReader, check_layout
from .targets import target_names

__all__ = [
    "PEFT_PREFIX",
    "Factor",
    "TensorReader",
    "adapter_values",
    "load_adapter_tensors",
    "parse_peft_key",
    "peft_export",
    "peft_key",
]

_RANK_DIM: Final[Mapping[Factor, int]] = {"A": 0, "B": 1}
_FACTORS: Final[tuple[Factor, Factor]] = ("A", "B")
_SHOWN: Final = 8


@dataclass(frozen=True)
class _InMemory:
    """A reader over tensors that are loaded already."""

    tensors: Mapping[str, Tensor]

    def keys(self) -> Iterable[str]:
        return self.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key].shape)

    def read(self, key: str, index: tuple[slice, ...]) -> Tensor:
        return self.tensors[key][index]


def peft_export(
    model: nn.Module,
    *,
    normalise: bool = True,
    base_model_name: str = "",
    adapter: str = DEFAULT_ADAPTER,
    experts: str = "single",
) -> dict[str, Any]:
    """How to make a PEFT adapter from this model's parameters, as plain data.

    With ``normalise`` the result computes the same in PEFT, vLLM and SGLang: one rank for all
    modules (the largest; others are zero-padded), ``alpha = r``, the scaling folded into B in
    fp32, no rsLoRA and no patterns. Without, the adapter keeps its training form, which PEFT
    understands and engines may not.

    Of a pipeline stage it is that of the whole model, so that all stages say the same.

    Args:
        model: a model on which ``apply_lora()`` was called, sharded or wrapped or not.
        normalise: see above.
        base_model_name: value of ``base_model_name_or_path``.
        adapter: which one; a file does not name it.
        experts: how adapters on experts are written: ``"single"``, each by itself, or
            ``"stacked"``, all of a layer in one tensor, for engines that want them so. Only said
            here: rules and configuration are those of the single form, of which a writer makes
            the other. Needs ``normalise``.

    Returns:
        ``{"peft_config": {...}, "rules": [{"source", "key", "scale", "pad_dim", "pad_to",
        "index"}, ...], "others": [...], "experts": ...}``, JSON-able; rules in the order of the
        modules, A before B; ``others`` are the names of the parameters of all other adapters.

    Raises:
        LoRANotEnabled: no LoRA in the model.
        NoAdapterError: modules that were adapted are gone, or no adapter has that name.
        LoRAConfigError: ``experts`` is neither form, or experts cannot be stacked.
    """
    if experts not in ("single", "stacked") or (experts == "stacked" and not normalise):
        msg = (
            f"experts must be 'single', or 'stacked' in the normalised form, got {experts!r} with "
            f"normalise={normalise}"
        )
        raise LoRAConfigError(msg)
    model = applied_lora(model).whole or model
    record = applied_lora(model, adapter)
    sites = adapter_sites(model, record, adapter=adapter)
    names = target_names(sites, record.module_names)
    config = record.config.to_peft(base_model_name=base_model_name, target_modules=names)
    # The names above are the ones that matched, so nothing is left to exclude, and the initial
    # values are behind us: engines accept only the default here.
    config |= {"exclude_modules": None, "init_lora_weights": True}
    widest = max(site.rank for site in sites.values())
    if normalise:
        config |= {
            "alpha_pattern": {},
            "lora_alpha": widest,
            "r": widest,
            "rank_pattern": {},
            "use_rslora": False,
        }
    rules: list[dict[str, Any]] = []
    for hf, site in sites.items():
        padded = normalise and site.rank < widest
        for factor in _FACTORS:
            rule = {
                "source": site.source(factor),
                "key": site.key(hf, factor),
                "scale": site.scaling if normalise and factor == "B" else 1.0,
                "pad_dim": _RANK_DIM[factor] if padded else None,
                "pad_to": widest if padded else None,
                "index": site.index,
            }
            rules.append(rule)
    own = {rule["source"] for rule in rules}
    others = [name for name in get_adapter_params(model, frozen=True) if name not in own]
    return {"peft_config": config, "rules": rules, "others": others, "experts": experts}


def load_adapter_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | TensorReader,
    peft_config: Mapping[str, Any],
    *,
    adapter: str = DEFAULT_ADAPTER,
) -> None:
    """Put a PEFT adapter's values into the parameters of one of the model's adapters.

    Everything is checked and every value made before the first parameter changes. B is rescaled
    when the file's scaling is not the model's, so a normalised export loads back into the model
    it came from (up to one rounding of B, none when the scaling is a power of two), and so does
    an adapter trained with another alpha. A file of a higher rank is taken if the surplus is zero
    padding.

    Works on parameters of any placement without communication: each rank copies its slice. Each
    rank checks only the values of its slice, so over several ranks take :func:`adapter_values`,
    let the ranks agree that all of them succeeded, and then write.

    Args:
        model: a model on which ``apply_lora()`` was called.
        tensors: by PEFT key, or a reader that gives parts of them.
        peft_config: content of the file's ``adapter_config.json``.
        adapter: which one takes the values.

    Raises:
        LoRANotEnabled: no LoRA in the model.
        NoAdapterError: no adapter has that name.
        LoRAConfigError: the config has options that are not supported, or values that cannot be.
        AdapterMismatch: keys missing or unexpected, wrong shapes, a rank other than the config
            says, or values that are not finite.
    """
    for parameter, part in adapter_values(model, tensors, peft_config, adapter=adapter):
        copy_local_(parameter, part)


def adapter_values(
    model: nn.Module,
    tensors: Mapping[str, Tensor] | TensorReader,
    peft_config: Mapping[str, Any],
    *,
    adapter: str = DEFAULT_ADAPTER,
) -> list[tuple[Tensor, Tensor]]:
    """The first half of :func:`load_adapter_tensors`: check and convert, change nothing.

    Args:
        model: as there.
        tensors: as there.
        peft_config: as there.
        adapter: as there.

    Returns:
        Each adapter parameter with this rank's part of its new value, for
        :func:`archon_lora.placement.copy_local_`.

    Raises:
        LoRANotEnabled: as there, like the three below.
        NoAdapterError: no adapter of that name.
        LoRAConfigError: options or values that cannot be.
        AdapterMismatch: the adapter does not fit.
    """
    reshard(model)
    sites = adapter_sites(model, applied_lora(model, adapter), adapter=adapter)
    parameters, written = _written_config(peft_config)
    given = _InMemory(tensors) if isinstance(tensors, Mapping) else tensors
    reader = StackedAdapter(given, written, parameters, sites)
    keys, problems = _match_keys(reader, sites)
    problems += _misshapen(reader, keys, sites)
    if problems:
        msg = (
            f"the adapter does not fit the model, which has {len(sites)} adapted modules: "
            f"{'; '.join(problems)}; check target_modules and rank"
        )
        raise AdapterMismatch(msg)
    values: dict[str, _Value] = {}
    for hf, site in sites.items():
        for factor in _FACTORS:
            value = values.setdefault(site.source(factor), _Value.of(site.parameter(factor)))
            index = value.inside(site.index)
            if index is None:
                continue
            read = _read(reader, keys[hf, factor], site, factor, reader.rank_for(hf), index)
            ratio = reader.scaling_for(hf) / site.scaling
            value.put(site.index, _convert(read, value, keys[hf, factor], factor, ratio))
    return [(value.parameter, value.part) for value in values.values()]


@dataclass(frozen=True)
class _Value:
    """This rank's part of a parameter's new value, while it is put together.

    Attributes:
        parameter: the live one.
        index: where the part lies in it.
        part: the new value; of a stack of experts those that this rank holds.
    """

    parameter: Tensor
    index: tuple[slice, ...]
    part: Tensor

    @classmethod
    def of(cls, parameter: Tensor) -> _Value:
        index = local_slice(parameter)
        sizes = [place.stop - place.start for place in index]
        return cls(parameter, index, torch.empty(sizes, dtype=parameter.dtype))

    def inside(self, expert: int | None) -> tuple[slice, ...] | None:
        """The part of one matrix that is wanted, or None for an expert of another rank."""
        if expert is None:
            return self.index
        held, *rest = self.index
        return tuple(rest) if held.start <= expert < held.stop else None

    def put(self, expert: int | None, values: Tensor) -> None:
        """Take the values of one matrix."""
        place = self.part if expert is None else self.part[expert - self.index[0].start]
        place.copy_(values)


def _written_config(peft_config: Mapping[str, Any]) -> tuple[tuple[str, ...], LoRAConfig]:
    """The file's ``target_parameters``, and its ranks and scalings.

    How its values were first drawn does not matter any more.
    """
    peft_config = dict(peft_config)
    parameters = tuple(peft_config.pop("target_parameters", None) or ())
    if parameters:
        check_layout(parameters, peft_config.get("peft_version"))
    check_fields(peft_config)
    init = peft_config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(("pissa", "olora", "corda", "loftq")):
        msg = (
            f"init_lora_weights={init!r} changes the base weights: convert the adapter to a plain "
            "LoRA (PEFT: save_pretrained(path_initial_model_for_weight_conversion=...)) first"
        )
        raise LoRAConfigError(msg)
    settings = {**peft_config, "init_lora_weights": True, "lora_dropout": 0.0, "task_type": None}
    # Tensor keys decide what is adapted; which names selected them is no matter here.
    settings |= {"target_modules": "all-linear", "exclude_modules": None}
    return parameters, LoRAConfig.from_peft(settings)


def _match_keys(
    reader: TensorReader, sites: Mapping[str, AdapterSite]
) -> tuple[dict[tuple[str, Factor], str], list[str]]:
    """The file's key of every factor, and which keys are missing, unexpected or double."""
    keys: dict[tuple[str, Factor], str] = {}
    unexpected, double = [], []
    for key in reader.keys():  # noqa: SIM118 - a reader is not a mapping
        try:
            factor = parse_peft_key(key)
        except UnmappedName:
            unexpected.append(key)
            continue
        site = sites.get(factor[0])
        if site is None or site.embedding != is_embedding_key(key):
            unexpected.append(key)
        elif factor in keys:
            double.append(key)
        else:
            keys[factor] = key
    missing = [s.key(hf, f) for hf, s in sites.items() for f in _FACTORS if (hf, f) not in keys]
    found = (("missing", missing), ("unexpected", unexpected), ("given twice", double))
    return keys, [f"{len(names)} {what}: {_some(names)}" for what, names in found if names]


def _misshapen(
    reader: StackedAdapter,
    keys: Mapping[tuple[str, Factor], str],
    sites: Mapping[str, AdapterSite],
) -> list[str]:
    """Tensors that have another rank than the file's config says, or do not fit the model."""
    wrong = []
    for (hf, factor), key in keys.items():
        site = sites[hf]
        rank = reader.rank_for(hf)
        wanted = (rank, site.in_features) if factor == "A" else (site.out_features, rank)
        shape = reader.shape(key)
        if shape != wanted:
            wrong.append(f"{key}: the file has {shape}, r={rank} and the model want {wanted}")
        elif rank < site.rank:
            wrong.append(f"{key}: the file has rank {rank}, the model {site.rank}; set rank")
    return [f"{len(wrong)} of the wrong shape: {_some(wrong)}"] if wrong else []


def _read(
    reader: TensorReader,
    key: str,
    site: AdapterSite,
    factor: Factor,
    rank: int,
    index: tuple[slice, ...],
) -> Tensor:
    """The wanted part of a tensor; what the file has beyond the model's rank must be zero."""
    part = reader.read(key, index)
    if not part.is_floating_point():
        msg = f"{key} must hold floating-point values, got {part.dtype}"
        raise AdapterMismatch(msg)
    surplus = list(index)
    surplus[_RANK_DIM[factor]] = slice(site.rank, rank)
    if torch.count_nonzero(reader.read(key, tuple(surplus))):
        msg = (
            f"{key} has rank {rank}, the model {site.rank}, and the surplus is not zero padding; "
            "set rank"
        )
        raise AdapterMismatch(msg)
    return part


def _convert(part: Tensor, value: _Value, key: str, factor: Factor, ratio: float) -> Tensor:
    """Values in the parameter's dtype, B by the ratio of the scalings."""
    if factor == "B" and ratio != 1.0:
        # In fp64, so that undoing a folded scaling adds no rounding of its own.
        part = part.double() * ratio
    converted = part.to(value.part.dtype)
    if not torch.isfinite(converted).all():
        msg = f"{key} holds values that are not finite in {value.part.dtype}"
        raise AdapterMismatch(msg)
    return converted


def _some(names: list[str]) -> str:
    """The first few, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
