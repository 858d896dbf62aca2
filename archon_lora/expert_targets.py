"""Which experts can take adapters, and the names by which they are targets."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from .config import LoRAConfig
from .errors import LoRAConfigError, TargetError

GATE, DOWN, UP = "w1", "w2", "w3"
"""Archon's names of the three stacks, ``(E, out, in)`` each."""

_STACKS = (GATE, DOWN, UP)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@runtime_checkable
class StackedExperts(Protocol):
    """Experts ``w2(silu(w1 x) * w3 x)`` in stacks ``w1``, ``w2``, ``w3`` of ``(E, out, in)``.

    Called with rows sorted by expert, ``(rows, hidden)``, and the number of rows of each expert.

    Attributes:
        expert_projections: what HuggingFace calls a stack's projection in one expert, by stack.
    """

    expert_projections: Mapping[str, str]


def check_experts(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Make sure that a module can be the base of a LoRAGroupedExperts.

    Args:
        module: the candidate.
        name: how to call it in errors.

    Returns:
        Its stacks by name.

    Raises:
        TargetError: the stacks are not three that fit together, or the module has more
            parameters, or hooks, which would be lost.
    """
    where = f"module {name!r}" if name else "the module"
    stacks = dict(module.named_parameters())
    shapes = {key: tuple(stack.shape) for key, stack in stacks.items()}
    wanted = isinstance(module, StackedExperts) and set(module.expert_projections) == set(stacks)
    fits = set(stacks) == set(_STACKS) and all(len(shape) == 3 for shape in shapes.values())
    if fits:
        experts, width, hidden = shapes[GATE]
        fits = shapes == {
            GATE: (experts, width, hidden),
            DOWN: (experts, hidden, width),
            UP: (experts, width, hidden),
        }
    if not (wanted and fits):
        msg = (
            f"{where} is a {type(module).__qualname__} with parameters {shapes}; experts that "
            f"take adapters have expert_projections and three stacks, {', '.join(_STACKS)}, of "
            "(experts, out, in)"
        )
        raise TargetError(msg)
    hooked = [attribute for attribute in _HOOKS if getattr(module, attribute, None)]
    if hooked:
        msg = f"{where} has hooks that would be lost ({', '.join(hooked)}); add them afterwards"
        raise TargetError(msg)
    return stacks


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """HF names of the projections of all experts of one module.

    Attributes:
        fqn: canonical name of the module.
        stacks: by stack, the HF names of its experts, in order.
    """

    fqn: str
    stacks: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, module: nn.Module, fqn: str, hf: str) -> ExpertNames:
        """Write the names out.

        Args:
            module: the experts, adapted already or not.
            fqn: canonical name of the module.
            hf: HF name of the module.

        Raises:
            TargetError: see :func:`check_experts`.
        """
        if not hasattr(module, "adapter_params"):
            check_experts(module, hf)
        count = module.get_parameter(GATE).shape[0]
        projections: Mapping[str, str] = module.expert_projections  # type: ignore[assignment]
        return cls(
            fqn,
            {
                stack: tuple(f"{hf}.{expert}.{projection}" for expert in range(count))
                for stack, projection in projections.items()
            },
        )

    def chosen(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """The stacks of which the names choose every expert, with their HF names.

        Args:
            names: HF names of all targets of the model.

        Raises:
            TargetError: the names choose some experts of a stack and not the others.
        """
        found = {}
        for stack, hf_names in self.stacks.items():
            left = [name for name in hf_names if name not in names]
            if len(left) == len(hf_names):
                continue
            if left:
                msg = (
                    f"target_modules selects {len(hf_names) - len(left)} of {len(hf_names)} "
                    f"experts and not {left[0]}: the experts of a projection lie in one tensor and "
                    "are adapted together"
                )
                raise TargetError(msg)
            found[stack] = hf_names
        return found


def expert_names(
    modules: Mapping[str, nn.Module], hf_names: Mapping[str, str]
) -> list[ExpertNames]:
    """The names in all modules of stacked experts.

    Args:
        modules: by canonical name.
        hf_names: HF names by canonical name.

    Raises:
        TargetError: see :func:`check_experts`.
    """
    return [
        ExpertNames.of(module, fqn, hf_names[fqn])
        for fqn, module in modules.items()
        if fqn and isinstance(module, StackedExperts)
    ]


def chosen_stacks(
    stacked: Sequence[ExpertNames], selected: Collection[str]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """The stacks to adapt, with the HF names of their experts, by the FQN of their module.

    Raises:
        TargetError: some experts of a stack are selected and others are not.
    """
    found = {names.fqn: names.chosen(selected) for names in stacked}
    return {fqn: stacks for fqn, stacks in found.items() if stacks}


def stack_settings(
    config: LoRAConfig, chosen: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> dict[str, dict[str, str]]:
    """By module and stack, the HF name that rank and alpha patterns are matched with.

    Raises:
        LoRAConfigError: experts of one stack have different ranks or alphas.
    """
    return {
        fqn: {stack: one_setting(config, names) for stack, names in stacks.items()}
        for fqn, stacks in chosen.items()
    }


def by_stack(
    chosen: Mapping[str, Mapping[str, tuple[str, ...]]],
) -> dict[str, tuple[str, ...]]:
    """HF names of experts by the canonical FQN of their stack."""
    return {f"{fqn}.{stack}": hf for fqn, s in chosen.items() for stack, hf in s.items()}


def one_setting(config: LoRAConfig, names: Sequence[str]) -> str:
    """The HF name that stands for all experts of a stack, if patterns give them one setting.

    Raises:
        LoRAConfigError: experts of one stack have different ranks or alphas.
    """
    settings = {(config.rank_for(name), config.alpha_for(name)): name for name in names}
    if len(settings) > 1:
        (first, one), (second, other) = list(settings.items())[:2]
        msg = (
            f"rank_pattern and alpha_pattern give {one} rank {first[0]} and alpha {first[1]:g}, "
            f"but {other} rank {second[0]} and alpha {second[1]:g}: the experts of a projection "
            "lie in one tensor and need one rank and alpha"
        )
        raise LoRAConfigError(msg)
    return names[0]
