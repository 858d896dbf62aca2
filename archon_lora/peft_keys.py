"""Keys of ``adapter_model.safetensors``: names alone, no adapter code behind them."""

from __future__ import annotations

import re
from typing import Final, Literal

from .errors import UnmappedName

Factor = Literal["A", "B"]

PEFT_PREFIX: Final = "base_model.model."
_KEY: Final = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight")


def peft_key(hf_module_name: str, factor: Factor) -> str:
    """Key of a factor in ``adapter_model.safetensors``.

    Args:
        hf_module_name: HF name of the adapted module.
        factor: ``"A"`` or ``"B"``.
    """
    return f"{PEFT_PREFIX}{hf_module_name}.lora_{factor}.weight"


def parse_peft_key(key: str) -> tuple[str, Factor]:
    """HF module name and factor of a key; the adapter name ``.default`` may be in it.

    Raises:
        UnmappedName: not the key of a linear layer's LoRA factor.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        msg = (
            f"{key!r} is not the key of a LoRA factor; keys read "
            f"{PEFT_PREFIX}<module>.lora_A.weight or .lora_B.weight"
        )
        raise UnmappedName(msg)
    return match[1], "A" if match[2] == "A" else "B"
