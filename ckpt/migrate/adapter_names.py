"""Which tensors of a model wrapped by PEFT are an adapter's, and how they are exported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from ckpt.peft_config import plain_key
from ckpt.types import AdapterExport, TensorRule

_ADAPTER: Final = re.compile(
    r"(?:.*\.)?(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.[^.]+)?(?:\.weight)?"
)
_PREFIX: Final = "base_model.model."


def is_adapter_name(name: str) -> bool:
    """Whether a parameter with this name is a part of an adapter of PEFT's."""
    return _ADAPTER.fullmatch(name) is not None


def adapter_export(
    settings: Mapping[str, Any] | None, shapes: Mapping[str, tuple[int, ...]]
) -> AdapterExport | None:
    """How the tensors become a PEFT adapter, if rank and alpha are known and all of it is plain.

    Args:
        settings: ``r``, ``lora_alpha`` and ``task_type``, or None.
        shapes: of the adapter's tensors, by FQN.

    Returns:
        None where something is missing: the step can be resumed from all the same, and exported by
        a trainer that restores it.
    """
    if settings is None or not shapes:
        return None
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or not isinstance(alpha, int | float) or rank < 1 or alpha <= 0:
        return None
    rules, modules = [], set()
    for fqn, shape in shapes.items():
        key = plain_key(fqn)
        module, _, side = key.removesuffix(".weight").rpartition(".")
        dims = {"lora_A": 0, "lora_B": 1}
        if not key.startswith(_PREFIX) or side not in dims or shape[dims[side]] != rank:
            return None
        modules.add(module.removeprefix(_PREFIX))
        rules.append(TensorRule(fqn, key))
    if len({rule.key for rule in rules}) != len(rules):
        return None  # several adapters: which one is meant is not known
    suffixes = {module.rpartition(".")[2] for module in modules}
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(suffixes),
        "task_type": settings.get("task_type") or None,
    }
    return AdapterExport(config, tuple(rules))
