"""The two forms in which PEFT and the engines have adapters on the experts of a mixture.

*single*: two matrices for each projection of each expert, as of any linear layer; what rules make,
what manifests hold, and what vLLM (for most models) and SGLang want. *stacked*: PEFT's
``target_parameters``, one pair for all experts of a layer; what vLLM wants for models that it
computes with three-dimensional weights. For ``E`` experts and ``R`` ranks A is ``(E R, in)``,
expert by expert, and B ``(out, R E)``, rank by rank (PEFT 0.19.1 and newer).

The gate and the up projection are one tensor there. Their ranks are put side by side, A below A
and B on rows of its own, so ``R`` is twice the rank, and everything else is padded to it: the
stacked form, too, has one rank and no patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from .errors import ConfigError
from .peft_config import split_key
from .planned import PlannedStack, PlannedTensor
from .types import AdapterExport

_EXPERT: Final = re.compile(r"(?P<block>(?:.+\.)?experts)\.(?P<number>\d+)\.(?P<projection>[^.]+)")
_FUSED: Final = ("gate_proj", "up_proj")
_DOWN: Final = ("down_proj",)


def file_key(export: AdapterExport, key: str) -> str:
    """The tensor of the file that holds what a rule makes.

    Args:
        export: its form counts.
        key: the rule's.
    """
    module, side = split_key(key)
    match = _EXPERT.fullmatch(module)
    if export.experts == "single" or match is None:
        return key
    return _stack_key(match["block"], match["projection"] in _FUSED, side)


def stack_experts(
    planned: Iterable[PlannedTensor], config: Mapping[str, Any]
) -> tuple[tuple[PlannedTensor | PlannedStack, ...], dict[str, Any]]:
    """The stacked form of a file that was planned in the single one.

    Args:
        planned: its tensors.
        config: its PEFT configuration.

    Returns:
        Tensors in file order, and the configuration.

    Raises:
        ConfigError: there are no experts, not all of them or of their projections are adapted, or
            the configuration has patterns or rsLoRA.
    """
    for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if config.get(name):
            msg = (
                f"experts are stacked with one rank and alpha, but peft_config has {name}="
                f"{config[name]!r}; export in the normalised form"
            )
            raise ConfigError(msg)
    width = 2 * int(config["r"])
    blocks: dict[tuple[str, str], dict[str, dict[int, PlannedTensor]]] = {}
    files: list[PlannedTensor | PlannedStack] = []
    modules: set[str] = set()
    for tensor in planned:
        module, side = split_key(tensor.key)
        match = _EXPERT.fullmatch(module)
        if match is None:
            modules.add(module)
            files.append(_widened(tensor, side, width))
        else:
            of_block = blocks.setdefault((match["block"], side), {})
            of_block.setdefault(match["projection"], {})[int(match["number"])] = tensor
    if not blocks:
        raise ConfigError("the adapter has no experts, so there are none to be stacked")
    for (block, side), projections in blocks.items():
        _check_whole(block, projections)
        files += [
            _stack(block, side, [projections[name] for name in names], width)
            for names in (_FUSED, _DOWN)
        ]
    parameters = sorted(
        f"{block}.{name}" for block, side in blocks if side == "A" for name in _PARAMETERS
    )
    changed = {
        "r": width,
        "lora_alpha": 2 * config["lora_alpha"],
        "target_modules": _remaining(config["target_modules"], modules),
        "target_parameters": parameters,
    }
    stacked = dict(sorted({**config, **changed}.items()))
    return tuple(sorted(files, key=lambda tensor: tensor.key)), stacked


_PARAMETERS: Final = ("gate_up_proj", "down_proj")


def _stack_key(block: str, fused: bool, side: str) -> str:
    # PEFT wraps the experts twice: the tensor that is adapted first lies inside.
    module = f"{block}.base_layer" if fused else block
    return f"base_model.model.{module}.lora_{side}.weight"


def _widened(tensor: PlannedTensor, side: str, width: int) -> PlannedTensor:
    dim = 0 if side == "A" else 1
    shape = (*tensor.shape[:dim], width, *tensor.shape[dim + 1 :])
    return PlannedTensor(replace(tensor.rule, pad_dim=dim, pad_to=width), tensor.record, shape)


def _check_whole(block: str, projections: Mapping[str, Mapping[int, PlannedTensor]]) -> None:
    wanted = {*_FUSED, *_DOWN}
    if projections.keys() != wanted:
        msg = (
            f"{block} has adapters on {', '.join(sorted(projections))}; the stacked form wants "
            f"{', '.join(sorted(wanted))}"
        )
        raise ConfigError(msg)
    count = 1 + max(max(experts) for experts in projections.values())
    for projection, experts in projections.items():
        missing = sorted(set(range(count)) - experts.keys())
        if missing:
            msg = f"{block}.{missing[0]}.{projection} has no adapter; stacks have every expert"
            raise ConfigError(msg)


def _stack(
    block: str, side: str, sides: list[dict[int, PlannedTensor]], width: int
) -> PlannedStack:
    """Tensors of one projection, or of two that are fused, for every expert."""
    experts = range(len(sides[0]))
    parts = tuple(tuple(projection[expert] for projection in sides) for expert in experts)
    if side == "A":
        shape = (len(parts) * width, parts[0][0].shape[1])
    else:
        shape = (sum(part.shape[0] for part in parts[0]), width * len(parts))
    return PlannedStack(_stack_key(block, len(sides) > 1, side), side, parts, width, shape)


def _remaining(targets: Any, modules: set[str]) -> list[str]:
    """Names that select the adapted modules other than experts."""
    if isinstance(targets, str):
        return sorted(modules)
    return sorted(
        target
        for target in targets
        if any(module == target or module.endswith(f".{target}") for module in modules)
    )
