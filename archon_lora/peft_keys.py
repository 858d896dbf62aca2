"""Keys of ``adapter_model.safetensors``: names alone, no adapter code behind them."""

from __future__ import annotations

import re
from typing import Final, Literal

from .errors import UnmappedName

Factor = Literal["A", "B"]

PEFT_PREFIX: Final = "base_model.model."
_KEY: Final = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight")
_EMBEDDING_KEY: Final = re.compile(
    rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_embedding_([AB])(?:\.default)?"
)


def peft_key(hf_module_name: str, factor: Factor, *, embedding: bool = False) -> str:
    """Key of a factor in ``adapter_model.safetensors``.

    Args:
        hf_module_name: HF name of the adapted module.
        factor: ``"A"`` or ``"B"``.
        embedding: the module is an embedding, whose factors are spelled otherwise.
    """
    if embedding:
        return f"{PEFT_PREFIX}{hf_module_name}.lora_embedding_{factor}"
    return f"{PEFT_PREFIX}{hf_module_name}.lora_{factor}.weight"


def parse_peft_key(key: str) -> tuple[str, Factor]:
    """HF module name and factor of a key; the adapter name ``.default`` may be in it.

    Raises:
        UnmappedName: not the key of a LoRA factor, of a linear layer or an embedding.
    """
    match = _KEY.fullmatch(key) or _EMBEDDING_KEY.fullmatch(key)
    if match is None:
        msg = (
            f"{key!r} is not the key of a LoRA factor; keys read "
            f"{PEFT_PREFIX}<module>.lora_A.weight or .lora_B.weight (of embeddings "
            ".lora_embedding_A or .lora_embedding_B)"
        )
        raise UnmappedName(msg)
    return match[1], "A" if match[2] == "A" else "B"


def is_embedding_key(key: str) -> bool:
    """Whether a key is of an embedding's factor."""
    return _EMBEDDING_KEY.fullmatch(key) is not None
