"""Qwen3-MoE's names: Archon, HuggingFace and PEFT.

HuggingFace stores a tensor for each expert and projection, Archon one for each projection, with
the expert first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from archon_lora.errors import AdapterMismatch, ModelLoadError
from archon_lora.models.base import template_of
from archon_lora.models.decoder_names import (
    ATTENTION_MODULES,
    FEED_FORWARD_MODULES,
    DecoderStateDictAdapter,
)
from archon_lora.models.experts import GroupedExperts
from archon_lora.names import canonical_fqn
from archon_lora.peft_keys import PEFT_PREFIX, parse_peft_key, peft_key
from archon_lora.placement import local_slice

from .config import Qwen3MoeConfig

_EXPERTS: Final = "layers.{}.moe.experts"
_HF_EXPERTS: Final = "model.layers.{}.mlp.experts"
_ROUTER: Final = "layers.{}.moe.router.gate"
_HF_ROUTER: Final = "model.layers.{}.mlp.gate"

_PROJECTIONS: Final[Mapping[str, str]] = {
    f"{_EXPERTS}.{ours}": f"{_HF_EXPERTS}.{{}}.{hf}"
    for ours, hf in GroupedExperts.expert_projections.items()
}
"""Archon's stack to HuggingFace's module of one expert."""


class Qwen3MoeStateDictAdapter(DecoderStateDictAdapter):
    """The names of Qwen3-MoE: Qwen3's, with experts and routers.

    The router's ``gate`` is a linear layer that only a target of its own name selects. Experts are
    targets by the names of their linear layers in HuggingFace; the feed-forward blocks of layers
    without experts are none.

    Attributes:
        stacked: Archon's stacked tensors, adapters' too, to HuggingFace's (PEFT's) of one expert.
    """

    peft_modules: ClassVar[Mapping[str, str]] = {
        **ATTENTION_MODULES,
        _ROUTER: _HF_ROUTER,
        "output": "lm_head",
    }

    model_config: Qwen3MoeConfig

    def __init__(self, model_config: Qwen3MoeConfig, *, composite: bool = False) -> None:
        """Build the maps; see the base class."""
        super().__init__(model_config, composite=composite)
        modules = {ours: self.hf_name(hf) for ours, hf in _PROJECTIONS.items()}
        self.stacked: dict[str, str] = {ours: f"{hf}.weight" for ours, hf in modules.items()}
        self._module_map |= {
            ours: self.hf_name(hf)
            for ours, hf in (
                ("layers.{}.feed_forward", "model.layers.{}.mlp"),
                ("layers.{}.moe", "model.layers.{}.mlp"),
                (_EXPERTS, _HF_EXPERTS),
            )
        }
        for ours, hf in modules.items():
            self.stacked[f"{ours}_lora_a"] = peft_key(hf, "A")
            self.stacked[f"{ours}_lora_b"] = peft_key(hf, "B")
        self._from_one = {hf: ours for ours, hf in self.stacked.items()}
        self.from_hf_map |= self._from_one
        self.to_hf_map |= self.stacked

    def _base_map(self) -> Mapping[str, str]:
        return {**super()._base_map(), f"{_HF_ROUTER}.weight": f"{_ROUTER}.weight"}

    def _written_out(self, modules: Mapping[str, str]) -> dict[str, str]:
        """Each layer with what it has: experts or a feed-forward block."""
        config = self.model_config
        dense = {ours: hf for ours, hf in modules.items() if ".moe" not in ours}
        sparse = {ours: hf for ours, hf in modules.items() if ".feed_forward" not in ours}
        written: dict[str, str] = {}
        for layer in range(config.num_hidden_layers):
            for ours, hf in (sparse if config.sparse(layer) else dense).items():
                written[ours.format(layer)] = hf.format(layer)
        return written

    def expert_linears(self) -> list[str]:
        """See the base class: the projections of every expert."""
        config = self.model_config
        return [
            self.hf_name(hf).format(layer, expert)
            for layer in range(config.num_hidden_layers)
            if config.sparse(layer)
            for hf in _PROJECTIONS.values()
            for expert in range(config.num_experts)
        ]

    def refused_linear(self) -> frozenset[str]:
        """HF names of the feed-forward blocks of layers without experts."""
        return frozenset(self._written_out(FEED_FORWARD_MODULES).values())

    def stored_as(self, name: str) -> tuple[str, ...]:
        """See the base class: a stacked tensor is stored expert by expert."""
        template, indices = template_of(canonical_fqn(name))
        if template not in self.stacked:
            return super().stored_as(name)
        experts = range(self.model_config.num_experts)
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
