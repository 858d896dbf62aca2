"""Names of models with experts: Archon, HuggingFace and PEFT.

HuggingFace stores a tensor for each expert and projection, Archon one for each projection, with
the expert first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from archon_lora.errors import AdapterMismatch, ModelLoadError
from archon_lora.names import canonical_fqn
from archon_lora.peft_keys import PEFT_PREFIX, parse_peft_key, peft_key
from archon_lora.placement import local_slice

from .base import template_of
from .decoder_names import DecoderStateDictAdapter
from .experts import GroupedExperts

EXPERTS: Final = "layers.{}.moe.experts"
HF_EXPERTS: Final = "model.layers.{}.mlp.experts"
ROUTER: Final = "layers.{}.moe.router.gate"
HF_ROUTER: Final = "model.layers.{}.mlp.gate"

_PROJECTIONS: Final[Mapping[str, str]] = {
    f"{EXPERTS}.{ours}": f"{HF_EXPERTS}.{{}}.{hf}"
    for ours, hf in GroupedExperts.expert_projections.items()
}
"""Archon's stack to HuggingFace's module of one expert."""


class ExpertCounts(Protocol):
    """What names need to know of a model's experts."""

    num_hidden_layers: int
    num_experts: int

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        ...


class ExpertStateDictAdapter(DecoderStateDictAdapter):
    """The names of a decoder with experts in some of its layers.

    The router's ``gate`` is a linear layer that only a target of its own name selects. Experts are
    targets by the names of their linear layers in HuggingFace.

    Attributes:
        stacked: Archon's stacked tensors, adapters' too, to HuggingFace's (PEFT's) of one expert.
    """

    def __init__(self, model_config: Any, *, composite: bool = False) -> None:
        """Build the maps; see the base class."""
        super().__init__(model_config, composite=composite)
        modules = {ours: self.hf_name(hf) for ours, hf in _PROJECTIONS.items()}
        self.stacked: dict[str, str] = {ours: f"{hf}.weight" for ours, hf in modules.items()}
        self._module_map |= {
            ours: self.hf_name(hf)
            for ours, hf in (
                ("layers.{}.feed_forward", "model.layers.{}.mlp"),
                ("layers.{}.moe", "model.layers.{}.mlp"),
                (EXPERTS, HF_EXPERTS),
            )
        }
        for ours, hf in modules.items():
            self.stacked[f"{ours}_lora_a"] = peft_key(hf, "A")
            self.stacked[f"{ours}_lora_b"] = peft_key(hf, "B")
        self._from_one = {hf: ours for ours, hf in self.stacked.items()}
        self.from_hf_map |= self._from_one
        self.to_hf_map |= self.stacked

    @property
    def counts(self) -> ExpertCounts:
        """The configuration, as far as experts go."""
        config: ExpertCounts = self.model_config  # type: ignore[assignment]  # the families' have it
        return config

    def _written_out(self, modules: Mapping[str, str]) -> dict[str, str]:
        """Each layer with what it has: experts or a feed-forward block."""
        dense = {ours: hf for ours, hf in modules.items() if ".moe" not in ours}
        sparse = {ours: hf for ours, hf in modules.items() if ".feed_forward" not in ours}
        written: dict[str, str] = {}
        for layer in range(self.counts.num_hidden_layers):
            for ours, hf in (sparse if self.counts.sparse(layer) else dense).items():
                written[ours.format(layer)] = hf.format(layer)
        return written

    def expert_linears(self) -> list[str]:
        """See the base class: the projections of every expert."""
        config = self.counts
        return [
            self.hf_name(hf).format(layer, expert)
            for layer in range(config.num_hidden_layers)
            if config.sparse(layer)
            for hf in _PROJECTIONS.values()
            for expert in range(config.num_experts)
        ]

    def stored_as(self, name: str) -> tuple[str, ...]:
        """See the base class: a stacked tensor is stored expert by expert."""
        template, indices = template_of(canonical_fqn(name))
        if template not in self.stacked:
            return super().stored_as(name)
        experts = range(self.counts.num_experts)
        return tuple(self.stacked[template].format(*indices, expert) for expert in experts)

    def convert_single_to_hf(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """See the base class; of a sharded stack, those experts that this rank holds.

        Raises:
            UnmappedName: no table has the name.
            AdapterMismatch: an expert itself is sharded.
        """
        if template_of(canonical_fqn(name))[0] not in self.stacked:
            return super().convert_single_to_hf(name, tensor)
        first = 0
        if isinstance(tensor, DTensor):
            # Every expert whole on one rank: no communication is needed to take them apart.
            held, *rest = local_slice(tensor)
            local = tensor.to_local()
            if local.numel() and any(
                part != slice(0, size) for part, size in zip(rest, tensor.shape[1:], strict=True)
            ):
                msg = f"{name} is sharded within experts ({tensor.placements}), not between them"
                raise AdapterMismatch(msg)
            first, tensor = held.start, local
        names = self.stored_as(name)
        return [(names[first + index], expert) for index, expert in enumerate(tensor.unbind(0))]

    def from_hf(self, hf_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See the base class; experts are stacked.

        Raises:
            UnmappedName: no table has one of the names.
            AdapterMismatch: two names mean the same tensor.
            ModelLoadError: experts are missing from a stack, or are too many.
        """
        stacks: dict[str, dict[str, Tensor]] = {}
        rest: dict[str, Tensor] = {}
        for hf_name, tensor in hf_state_dict.items():
            ours = self._from_one.get(_plain(template_of(hf_name)[0]))
            if ours is None:
                rest[hf_name] = tensor
            else:
                layer = template_of(hf_name)[1][0]
                stacks.setdefault(ours.format(layer), {})[_plain(hf_name)] = tensor
        converted = super().from_hf(rest)
        for ours, experts in stacks.items():
            wanted = self.stored_as(ours)
            if odd := sorted(set(wanted) ^ experts.keys()):
                msg = f"{ours} wants {len(wanted)} experts; missing or unexpected: {odd}"
                raise ModelLoadError(msg)
            converted[ours] = torch.stack([experts[name] for name in wanted])
        return converted


def _plain(hf_name: str) -> str:
    """A PEFT key without an adapter's name, which a live PEFT model's keys have."""
    return peft_key(*parse_peft_key(hf_name)) if hf_name.startswith(PEFT_PREFIX) else hf_name
