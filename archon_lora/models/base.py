"""Names of a model's tensors: Archon's spelling, HuggingFace's, and PEFT's.

Archon (like torchtune) spells an adapter ``<module>.lora_a.weight`` and ``<module>.lora_b.weight``,
PEFT ``base_model.model.<HF module>.lora_A.weight`` and ``….lora_B.weight``. A state-dict adapter
holds the tables of one model family and converts both ways. A name in no table is an error: a
tensor dropped here would be missing from a saved model or a weight update without a word.
"""

from __future__ import annotations

import re
from abc import ABC
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from archon_lora.errors import AdapterMismatch, ModelLoadError, TargetError, UnmappedName
from archon_lora.names import canonical_fqn
from archon_lora.peft_keys import PEFT_PREFIX, parse_peft_key, peft_key

if TYPE_CHECKING:
    from archon_lora.config import LoRAConfig

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def template_of(name: str) -> tuple[str, tuple[str, ...]]:
    """Split a name into its template and indices.

    >>> template_of("layers.3.attention.wq.weight")
    ('layers.{}.attention.wq.weight', ('3',))
    """
    return _INDEX.sub("{}", name), tuple(_INDEX.findall(name))


class BaseStateDictAdapter(ABC):
    """Converts state dicts between Archon's names and HuggingFace's (PEFT's for adapters).

    A model family subclasses it and fills the class tables; every name in them may hold ``{}``
    where a layer (or expert) index stands.

    Attributes:
        base_from_hf: HF tensor name to Archon tensor name, for the base model.
        peft_modules: Archon module name to HF module name, for the modules that LoRA may target.
        output_module: Archon name of the output head, which ``all-linear`` leaves out.
        ignored_hf: HF tensor names of old checkpoints that carry nothing: they follow from the
            configuration. The only names that ``from_hf`` leaves out.
        from_hf_map: all of HF (and PEFT) to Archon, with the LoRA entries.
        to_hf_map: the inverse of ``from_hf_map``.
    """

    base_from_hf: ClassVar[Mapping[str, str]]
    peft_modules: ClassVar[Mapping[str, str]]
    output_module: ClassVar[str | None] = None
    ignored_hf: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, model_config: Any, *, composite: bool = False) -> None:
        """Build the maps.

        Args:
            model_config: the model's configuration, with ``num_hidden_layers``; subclasses leave
                out what it says the model does not have.
            composite: HF names are those of the language model inside a model of several parts
                (text and images): ``model.language_model.`` where a text model has ``model.``.
        """
        self.model_config = model_config
        self.composite = composite
        base = {self.hf_name(hf): ours for hf, ours in self._base_map().items()}
        self.from_hf_map: dict[str, str] = dict(base)
        for module, hf_module in self.to_peft_module_map().items():
            self.from_hf_map[peft_key(hf_module, "A")] = f"{module}.lora_a.weight"
            self.from_hf_map[peft_key(hf_module, "B")] = f"{module}.lora_b.weight"
        self.to_hf_map: dict[str, str] = {ours: hf for hf, ours in self.from_hf_map.items()}
        self._module_map = {
            ours.removesuffix(".weight"): hf.removesuffix(".weight")
            for hf, ours in base.items()
            if ours.endswith(".weight")
        }

    def hf_name(self, text_name: str) -> str:
        """HF name of what the tables call ``text_name``: another one inside a composite model."""
        if self.composite and text_name.startswith("model."):
            # Here and not above: a model without LoRA imports none of its code.
            from archon_lora.targets import COMPOSITE_PREFIX

            return COMPOSITE_PREFIX + text_name.removeprefix("model.")
        return text_name

    def _base_map(self) -> Mapping[str, str]:
        """The base table of this very model; subclasses drop what its configuration leaves out."""
        return self.base_from_hf

    def to_peft_module_map(self) -> dict[str, str]:
        """Archon module name to HF module name (both with ``{}``) of all that LoRA may target."""
        return {ours: self.hf_name(hf) for ours, hf in self.peft_modules.items()}

    def create_peft_adapter_config(
        self, lora_config: LoRAConfig, base_model_name_or_path: str
    ) -> dict[str, Any]:
        """The ``adapter_config.json`` of an adapter trained with these settings on this model.

        Args:
            lora_config: rank, alpha and targets; targets are HF names, as everywhere.
            base_model_name_or_path: how PEFT and the engines find the base model.

        Returns:
            A JSON-able mapping. ``target_modules`` is a sorted list of HF names that selects
            exactly the adapted modules, also where the settings say ``"all-linear"`` or give a
            pattern.

        Raises:
            TargetError: a target, exclusion or pattern that is for no module of this model.
        """
        # Here and not above: a model without LoRA imports none of its code.
        from archon_lora.targets import match_targets, target_names

        linear = self._written_out(self.to_peft_module_map())
        experts = self.expert_linears()
        names = [*self._written_out(self._module_map).values(), *experts]
        heads = {linear[self.output_module]} if self.output_module in linear else set()
        chosen = match_targets(
            lora_config,
            names,
            linear_names={*linear.values(), *experts, *self.refused_linear()},
            output_names=heads,
        )
        wrong = sorted(set(chosen) - {*linear.values(), *experts})
        if wrong:
            msg = f"target_modules selects {', '.join(wrong)}, which cannot take an adapter"
            raise TargetError(msg)
        return lora_config.to_peft(
            base_model_name=base_model_name_or_path, target_modules=target_names(chosen, names)
        )

    def expert_linears(self) -> list[str]:
        """HF names of the linear layers of single experts, which lie stacked here."""
        return []

    def refused_linear(self) -> frozenset[str]:
        """HF names of linear layers that ``"all-linear"`` selects and that take no adapter."""
        return frozenset()

    def _written_out(self, modules: Mapping[str, str]) -> dict[str, str]:
        """A table of modules with the index of every layer of this model in place of ``{}``."""
        layers = range(self.model_config.num_hidden_layers)
        return {
            ours.format(index): hf.format(index)
            for ours, hf in modules.items()
            for index in (layers if "{}" in ours else (0,))
        }

    def module_to_hf(self, fqn: str) -> str | None:
        """HF name of a module, or None for one that HF does not have.

        Usable as the ``name_map`` of ``apply_lora``, whose targets are HF names.
        """
        template, indices = template_of(canonical_fqn(fqn))
        hf = self._module_map.get(template)
        return None if hf is None else hf.format(*indices)

    def convert_single_to_hf(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """HF name and value of one tensor; adapters get their PEFT name.

        Args:
            name: Archon name; the prefixes of wrappers are removed.
            tensor: the value, passed on as it is.

        Returns:
            (HF name, tensor) pairs.

        Raises:
            UnmappedName: no table has the name.
        """
        try:
            return [(self._hf_name(name), tensor)]
        except UnmappedName as error:
            msg = f"{error} (shape {tuple(tensor.shape)})"
            raise UnmappedName(msg) from None

    def stored_as(self, name: str) -> tuple[str, ...]:
        """HF names of the tensors that hold one of Archon's.

        Args:
            name: Archon name; the prefixes of wrappers are removed.

        Returns:
            One name for a tensor that is stored as it is. Several for one that is a stack: they
            hold its slices along the first dimension, in order.

        Raises:
            UnmappedName: no table has the name.
        """
        return (self._hf_name(name),)

    def _hf_name(self, name: str) -> str:
        template, indices = template_of(canonical_fqn(name))
        hf = self.to_hf_map.get(template)
        if hf is None:
            msg = (
                f"{type(self).__name__} has no HuggingFace name for {name!r}; "
                "add it to the map, it must not be dropped"
            )
            raise UnmappedName(msg)
        return hf.format(*indices)

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert a whole state dict, base and adapter tensors alike.

        Raises:
            UnmappedName: no table has one of the names.
        """
        return {
            hf: value
            for name, tensor in state_dict.items()
            for hf, value in self.convert_single_to_hf(name, tensor)
        }

    def hf_aliases(self) -> Mapping[str, str]:
        """HF tensors that may be stored as a second copy of another: alias to original."""
        return {}

    def from_hf_name(self, hf_name: str) -> str | None:
        """Archon name of an HF or PEFT tensor, None for one in ``ignored_hf``.

        Raises:
            UnmappedName: no table has the name.
        """
        plain = hf_name
        if plain.startswith(PEFT_PREFIX):
            # A live PEFT model puts the adapter's name before ".weight"; its files do not.
            plain = peft_key(*parse_peft_key(plain))
        template, indices = template_of(plain)
        if template in map(self.hf_name, self.ignored_hf):
            return None
        ours = self.from_hf_map.get(template)
        if ours is None:
            msg = f"{type(self).__name__} has no Archon name for {hf_name!r}; add it to the map"
            raise UnmappedName(msg)
        return ours.format(*indices)

    def from_hf(self, hf_state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert HF and PEFT names to Archon's.

        Raises:
            UnmappedName: no table has one of the names, and it is not in ``ignored_hf``.
            AdapterMismatch: two names mean the same tensor.
            ModelLoadError: a second copy of a tied tensor differs from the first.
        """
        converted: dict[str, Tensor] = {}
        aliases = self.hf_aliases()
        for hf_name, tensor in hf_state_dict.items():
            original = hf_state_dict.get(aliases.get(hf_name, ""))
            if original is not None:
                if not torch.equal(tensor, original):
                    msg = f"{hf_name!r} differs from {aliases[hf_name]!r}, but the model ties them"
                    raise ModelLoadError(msg)
                continue
            ours = self.from_hf_name(hf_name)
            if ours is None:
                continue
            if ours in converted:
                msg = f"{hf_name!r} is given twice: another name also means {ours!r}"
                raise AdapterMismatch(msg)
            converted[ours] = tensor
        return converted
