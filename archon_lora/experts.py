"""LoRA on the experts of a mixture, which lie stacked in three tensors.

Shape suffixes: ``_RI``, ``_RO`` rows sorted by expert, with input or output features; E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import LoRAConfigError, TargetError
from .factors import reset_factors
from .grouped import grouped_linear, local_stack
from .merge import merge_factors

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


def factor_names(stack: str) -> tuple[str, str]:
    """Names of the parameters A and B of a stack's adapter."""
    return f"{stack}_lora_a", f"{stack}_lora_b"


class LoRAGroupedExperts(nn.Module):
    """Stacked experts with a low-rank update for each expert, as one LoRALinear each would have.

    ``A`` is ``(E, rank, in)`` and ``B`` ``(E, out, rank)``, parameters of this very module beside
    the frozen stacks, whose names stay. So what shards the stacks between experts, or gathers
    them, does so with the factors. Values of A are drawn from the seed and the name for the whole
    stack, in the range that one expert's input width gives; B starts at zero.

    Attributes:
        expert_projections: as in :class:`StackedExperts`.
        ranks: inner dimension by adapted stack, as the two below.
        alphas: numerator of the scaling.
        scalings: factor on the update.
        disabled: when true, forward computes the base experts alone.
        fqn: canonical name of this module in the model; seeds the initial values.
    """

    def __init__(
        self,
        base: nn.Module,
        config: LoRAConfig,
        targets: Mapping[str, str],
        *,
        fqn: str = "",
    ) -> None:
        """Put adapters beside the stacks of existing experts, which are shared, not copied.

        Args:
            base: the experts; its parameters are frozen, since they are the same objects.
            config: rank, alpha, dropout, initial values and dtype of the adapters.
            targets: by stack, the HF name that rank and alpha patterns are matched with.
            fqn: canonical name of the experts in the model.

        Raises:
            TargetError: the module is not what :class:`StackedExperts` describes.
        """
        super().__init__()
        stacks = check_experts(base, fqn)
        for name, stack in stacks.items():
            stack.requires_grad_(False)
            self.register_parameter(name, stack)
        self.expert_projections: Mapping[str, str] = dict(base.expert_projections)  # type: ignore[arg-type]
        self.ranks = {stack: config.rank_for(hf) for stack, hf in targets.items()}
        self.alphas = {stack: config.alpha_for(hf) for stack, hf in targets.items()}
        self.scalings = {stack: config.scaling_for(hf) for stack, hf in targets.items()}
        self.init = config.init
        self.seed = config.seed
        self.fqn = fqn
        self.disabled = False
        self.dropout = nn.Dropout(config.dropout)
        where = stacks[GATE].device
        for target, rank in self.ranks.items():
            experts, wide, narrow = stacks[target].shape
            shapes = ((experts, rank, narrow), (experts, wide, rank))
            for name, shape in zip(factor_names(target), shapes, strict=True):
                empty = torch.empty(shape, device=where, dtype=config.adapter_dtype)
                self.register_parameter(name, nn.Parameter(empty))
        if where.type != "meta":
            self.reset_adapter()
        self.train(base.training)

    @property
    def experts(self) -> int:
        """Number of experts on all ranks together."""
        return int(self.get_parameter(GATE).shape[0])

    def forward(self, x_RI: Tensor, counts_E: Tensor) -> Tensor:
        """Each expert on its rows.

        Args:
            x_RI: rows sorted by expert, ``(rows, hidden)``.
            counts_E: rows of each expert that this rank holds, int64.

        Returns:
            ``(rows, hidden)``.
        """
        gate = F.silu(self._project(GATE, x_RI, counts_E))
        return self._project(DOWN, gate * self._project(UP, x_RI, counts_E), counts_E)

    def _project(self, stack: str, x_RI: Tensor, counts_E: Tensor) -> Tensor:
        base_RO = grouped_linear(x_RI, local_stack(self.get_parameter(stack)), counts_E)
        if self.disabled or stack not in self.ranks:
            return base_RO
        a, b = (local_stack(self.get_parameter(name)) for name in factor_names(stack))
        down = grouped_linear(self.dropout(x_RI.to(a.dtype)), a, counts_E)
        # Scaled at rank width, as LoRALinear does it.
        update_RO = grouped_linear(down * self.scalings[stack], b, counts_E)
        return (base_RO + update_RO).to(base_RO.dtype)

    def adapter_params(self) -> list[str]:
        """Names of the parameters that belong to the adapter."""
        return [name for stack in self.ranks for name in factor_names(stack)]

    def reset_adapter(self) -> None:
        """Write the initial values: A drawn from (seed, name), B zero; the base is not touched.

        Works on plain parameters and on DTensors of any placement, without communication.

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        kinds = (self.init, "zeros")
        factors = [
            (name, self.get_parameter(name), kind)
            for stack in self.ranks
            for name, kind in zip(factor_names(stack), kinds, strict=True)
        ]
        reset_factors(factors, fqn=self.fqn, seed=self.seed)

    def merged_stacks(self) -> Iterator[tuple[str, Tensor]]:
        """Each adapted stack with its update, in fp32 and as a new tensor: ``W + scaling * B A``.

        On sharded parameters every rank gets whole stacks; all ranks of the mesh must iterate.

        Yields:
            Pairs (name of the stack, ``(E, out, in)``).
        """
        for stack in self.ranks:
            a, b = (self.get_parameter(name) for name in factor_names(stack))
            yield stack, merge_factors(self.get_parameter(stack), a, b, self.scalings[stack])

    def enable(self) -> None:
        """Let forward add the updates."""
        self.disabled = False

    def disable(self) -> None:
        """Let forward compute the base experts alone."""
        self.disabled = True

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        state = ", disabled" if self.disabled else ""
        stacks = ", ".join(
            f"{s}: rank={r}, alpha={self.alphas[s]:g}" for s, r in self.ranks.items()
        )
        return f"experts={self.experts}, {stacks}{state}"


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
            module: the experts.
            fqn: canonical name of the module.
            hf: HF name of the module.

        Raises:
            TargetError: see :func:`check_experts`.
        """
        stacks = check_experts(module, hf)
        count = stacks[GATE].shape[0]
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
