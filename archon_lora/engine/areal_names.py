"""AReaL's tables of names, read for adapters, and a guard around its state-dict adapter.

AReaL's adapters map tensors (``to_hf_map``: Archon name to HuggingFace name, ``{}`` for the layer)
and leave out, without a word, what they do not know. LoRA's parameters are such names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from archon_lora.errors import LoRAConfigError, UnmappedName
from archon_lora.models.base import template_of
from archon_lora.names import canonical_fqn

_WEIGHT = ".weight"


def hf_module_names(adapter: Any) -> Callable[[str], str | None]:
    """A ``name_map`` for ``apply_lora`` from one of AReaL's state-dict adapters.

    A module is called as its weight is there. One without a weight, such as stacked experts, takes
    the part of its parameters' HuggingFace name that ends in its own last component, so that the
    rules for routers find it.

    Raises:
        LoRAConfigError: the adapter has no ``to_hf_map``.
    """
    table: Mapping[str, str] | None = getattr(adapter, "to_hf_map", None)
    if not table:
        msg = (
            f"{type(adapter).__name__} has no to_hf_map: LoRA's targets and exports are "
            "HuggingFace names, and this model has none"
        )
        raise LoRAConfigError(msg)
    composite: Callable[[str], str] = getattr(adapter, "_maybe_composite_hf_key", lambda key: key)
    modules = {
        ours.removesuffix(_WEIGHT): composite(hf).removesuffix(_WEIGHT)
        for ours, hf in table.items()
        if ours.endswith(_WEIGHT) and hf.endswith(_WEIGHT)
    }
    for ours, hf in table.items():
        parent = ours.rpartition(".")[0]
        last = parent.rpartition(".")[2]
        head, found, _ = composite(hf).partition(f".{last}.")
        if parent and found:
            modules.setdefault(parent, f"{head}.{last}")

    def lookup(fqn: str) -> str | None:
        template, indices = template_of(canonical_fqn(fqn))
        hf = modules.get(template)
        if hf is None or hf.count("{}") != len(indices):
            return None
        return hf.format(*indices)

    return lookup


class GuardedNames:
    """AReaL's state-dict adapter, which says so when an adapter's tensors would get lost in it.

    ``Saver`` in its asynchronous mode writes any ``ArchonEngine`` through :meth:`to_hf` without
    calling ``engine.save()``: of a model with LoRA it would write the frozen base, and report
    success.

    Args:
        adapter: AReaL's.
        is_loading: whether the base's weights are being loaded, which goes through here as well.
    """

    def __init__(self, adapter: Any, is_loading: Callable[[], bool]) -> None:
        self._adapter = adapter
        self._is_loading = is_loading

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def to_hf(self, state_dict: Mapping[str, Tensor]) -> Any:
        """AReaL's mapping of the base's tensors.

        Raises:
            UnmappedName: an adapter's tensors are among them, and nothing is being loaded.
        """
        lost = [name for name in state_dict if _is_factor(name)]
        if lost and not self._is_loading():
            msg = (
                f"{lost[0]!r} and {len(lost) - 1} more belong to the LoRA adapter, which AReaL's "
                "own writer leaves out: this save goes past engine.save(), as Saver's mode "
                "'async' or 'auto' does. Set saver.mode: sync; a CheckpointManager over "
                "engine.train_state() saves in the background"
            )
            raise UnmappedName(msg)
        return self._adapter.to_hf(
            {name: tensor for name, tensor in state_dict.items() if not _is_factor(name)}
        )

    def convert_single_to_hf(self, name: str, tensor: Tensor) -> Any:
        """AReaL's mapping of one tensor of the base.

        Raises:
            UnmappedName: it is an adapter's.
        """
        if _is_factor(name):
            msg = f"{name!r} belongs to the LoRA adapter; only update_weights(type='disk') sends it"
            raise UnmappedName(msg)
        return self._adapter.convert_single_to_hf(name, tensor)


def _is_factor(name: str) -> bool:
    parts = canonical_fqn(name).split(".")
    return len(parts) > 2 and parts[-2] in ("lora_a", "lora_b")
