"""LoRA on the experts of a mixture, which lie stacked in three tensors.

Shape suffixes: ``_RI``, ``_RO`` rows sorted by expert, with input or output features; E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import LoRAConfigError, NoAdapterError
from .expert_targets import DOWN, GATE, UP, check_experts
from .factors import reset_factors
from .grouped import grouped_linear, local_stack
from .merge import merge_factors
from .names import DEFAULT_ADAPTER


def factor_names(stack: str) -> tuple[str, str]:
    """Names of the parameters A and B of a stack's adapter."""
    return f"{stack}_lora_a", f"{stack}_lora_b"


class StackFactors(nn.Module):
    """One adapter of stacked experts: A ``(E, rank, in)`` and B ``(E, out, rank)`` by stack.

    Values of A are drawn from the seed and the name for the whole stack, in the range that one
    expert's input width gives; B starts at zero.

    Attributes:
        ranks: inner dimension by adapted stack, as the two below.
        alphas: numerator of the scaling.
        scalings: factor on the update.
        dropout: applied to the adapter's input.
        init: initial values of A.
        fqn: canonical name of the module that the parameters are in; seeds the initial values.
        seed: with the name, the seed of A.
        trainable: whether the parameters train.
    """

    def __init__(
        self,
        stacks: Mapping[str, Tensor],
        config: LoRAConfig,
        targets: Mapping[str, str],
        *,
        fqn: str,
        trainable: bool = True,
    ) -> None:
        """Make the parameters.

        Args:
            stacks: the base's, by name.
            config: rank, alpha, dropout, initial values and dtype.
            targets: by adapted stack, the HF name that rank and alpha patterns are matched with.
            fqn: canonical name of this module.
            trainable: whether the parameters train.
        """
        super().__init__()
        self.ranks = {stack: config.rank_for(hf) for stack, hf in targets.items()}
        self.alphas = {stack: config.alpha_for(hf) for stack, hf in targets.items()}
        self.scalings = {stack: config.scaling_for(hf) for stack, hf in targets.items()}
        self.init = config.init
        self.seed = config.seed
        self.fqn = fqn
        self.trainable = trainable
        self.dropout = nn.Dropout(config.dropout)
        for target, rank in self.ranks.items():
            experts, wide, narrow = stacks[target].shape
            shapes = ((experts, rank, narrow), (experts, wide, rank))
            for name, shape in zip(factor_names(target), shapes, strict=True):
                empty = torch.empty(shape, device=stacks[target].device, dtype=config.adapter_dtype)
                self.register_parameter(name, nn.Parameter(empty, requires_grad=trainable))

    def own_factors(self) -> list[str]:
        """Names of the parameters, A before B of each stack."""
        return [name for stack in self.ranks for name in factor_names(stack)]

    def reset_own(self) -> None:
        """Write the initial values; raises NoAdapterError for parameters on the meta device."""
        kinds = (self.init, "zeros")
        factors = [
            (name, self.get_parameter(name), kind)
            for stack in self.ranks
            for name, kind in zip(factor_names(stack), kinds, strict=True)
        ]
        reset_factors(factors, fqn=self.fqn, seed=self.seed)

    def update_of(self, stack: str, x_RI: Tensor, counts_E: Tensor) -> Tensor:
        """What is added to the output of a stack that this adapter is for."""
        a, b = (local_stack(getattr(self, name)) for name in factor_names(stack))
        down = grouped_linear(self.dropout(x_RI.to(a.dtype)), a, counts_E)
        # Scaled at rank width, as LoRALinear does it.
        return grouped_linear(down * self.scalings[stack], b, counts_E)


class StackFactorsByName(nn.ModuleDict):
    """Further adapters by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> StackFactors: ...  # nn.ModuleDict says Module


class LoRAGroupedExperts(StackFactors):
    """Stacked experts with a low-rank update for each expert, as one LoRALinear each would have.

    The default adapter's factors are parameters of this very module beside the frozen stacks, whose
    names stay. So what shards the stacks between experts, or gathers them, does so with the
    factors. Further adapters are children, ``adapters.<name>.w1_lora_a``.

    Attributes:
        expert_projections: as in :class:`archon_lora.expert_targets.StackedExperts`.
        disabled: when true, forward computes the base experts alone.
        active: name of the adapter that forward uses otherwise; the base alone if it is not here.
    """

    adapters: StackFactorsByName

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
            config: rank, alpha, dropout, initial values and dtype of the default adapter.
            targets: by stack, the HF name that rank and alpha patterns are matched with. Without
                any, there is no default adapter.
            fqn: canonical name of the experts in the model.

        Raises:
            TargetError: the module is not what
                :class:`archon_lora.expert_targets.StackedExperts` describes.
        """
        stacks = check_experts(base, fqn)
        super().__init__(stacks, config, targets, fqn=fqn)
        own = dict(self._parameters)
        self._parameters.clear()  # the base's come first
        for name, stack in stacks.items():
            stack.requires_grad_(False)
            self.register_parameter(name, stack)
        self._parameters.update(own)
        self.expert_projections: Mapping[str, str] = dict(
            base.expert_projections  # type: ignore[arg-type]  # checked above
        )
        self.disabled = False
        self.active = DEFAULT_ADAPTER
        if stacks[GATE].device.type != "meta":
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
        base_RO = grouped_linear(x_RI, local_stack(getattr(self, stack)), counts_E)
        if self.disabled or self.active not in self.adapter_names():
            return base_RO
        adapter = self.adapter_of(self.active)
        if stack not in adapter.ranks:
            return base_RO
        update_RO = adapter.update_of(stack, x_RI, counts_E)
        return (base_RO + update_RO).to(base_RO.dtype)

    def adapter_params(self) -> list[str]:
        """Names of the parameters of all adapters that train."""
        return self._params(trainable=True)

    def frozen_adapter_params(self) -> list[str]:
        """The same of those that do not; a run cannot go on without them, so they are saved too."""
        return self._params(trainable=False)

    def _params(self, *, trainable: bool) -> list[str]:
        return [
            local
            for name in self.adapter_names()
            if self.adapter_of(name).trainable == trainable
            for local in self.params_of(name)
        ]

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that have parameters here, the default one first."""
        default = (DEFAULT_ADAPTER,) if self.ranks else ()
        return (*default, *(self.adapters if "adapters" in self._modules else ()))

    def params_of(self, name: str) -> list[str]:
        """Names, relative to this module, of one adapter's parameters; empty if there are none."""
        if name not in self.adapter_names():
            return []
        prefix = "" if name == DEFAULT_ADAPTER else f"adapters.{name}."
        return [prefix + local for local in self.adapter_of(name).own_factors()]

    def adapter_of(self, name: str) -> StackFactors:
        """What holds one adapter's factors, ranks, alphas and scalings.

        Raises:
            NoAdapterError: there is no such adapter here.
        """
        if name not in self.adapter_names():
            has = ", ".join(map(repr, self.adapter_names())) or "none"
            msg = f"{self.fqn or 'these experts'} have no adapter {name!r}; they have {has}"
            raise NoAdapterError(msg)
        return self if name == DEFAULT_ADAPTER else self.adapters[name]

    def add_adapter(
        self, name: str, config: LoRAConfig, targets: Mapping[str, str], *, trainable: bool
    ) -> None:
        """Hold one more adapter, under a name that is not taken here; arguments as above."""
        stacks = {stack: self.get_parameter(stack) for stack in self.expert_projections}
        fqn = f"{self.fqn}.adapters.{name}"
        made = StackFactors(stacks, config, targets, fqn=fqn, trainable=trainable)
        if not stacks[GATE].is_meta:
            made.reset_own()
        if "adapters" not in self._modules:
            self.adapters = StackFactorsByName()
        self.adapters[name] = made.train(self.training)

    def drop_adapter(self, name: str) -> None:
        """Let go of an adapter that :meth:`add_adapter` added."""
        del self.adapters[name]
        if not self.adapters:
            del self.adapters

    def activate(self, name: str) -> None:
        """Let this name's adapter be the one that forward uses; does not enable."""
        self.active = name

    def split_factors(self) -> list[tuple[str, str]]:
        """Names of A and B of every stack and adapter, for a style over ranks that see the same.

        Raises:
            LoRAConfigError: an adapter has dropout, whose masks the ranks would draw differently.
        """
        pairs = []
        for name in self.adapter_names():
            rate = self.adapter_of(name).dropout.p
            if rate:
                msg = (
                    f"{self.fqn or 'these experts'}: dropout={rate:g} with tensor parallelism: "
                    "ranks would draw different masks for the same rows; set lora.dropout to 0"
                )
                raise LoRAConfigError(msg)
            names = self.params_of(name)
            pairs += list(zip(names[::2], names[1::2], strict=True))
        return pairs

    def reset_adapter(self) -> None:
        """Write the initial values of every adapter; the base is not touched.

        Works on plain parameters and on DTensors of any placement, without communication.

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        for name in self.adapter_names():
            self.adapter_of(name).reset_own()

    def merged_stacks(self, adapter: str = DEFAULT_ADAPTER) -> Iterator[tuple[str, Tensor]]:
        """Each stack that an adapter is for, with its update: ``W + scaling * B A``, in fp32.

        On sharded parameters every rank gets whole stacks; all ranks of the mesh must iterate.

        Yields:
            Pairs (name of the stack, a new tensor ``(E, out, in)``).

        Raises:
            NoAdapterError: there is no such adapter here.
        """
        held = self.adapter_of(adapter)
        for stack, scaling in held.scalings.items():
            a, b = (held.get_parameter(name) for name in factor_names(stack))
            yield stack, merge_factors(self.get_parameter(stack), a, b, scaling)

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
