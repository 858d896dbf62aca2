"""The rules: what can be wrong with an adapter, and what each engine does about it.

Observed with PEFT 0.21, vLLM 0.32 and 0.33, and SGLang 0.5.23; other releases are named where
they differ. A table for people is in ``docs/portable-adapters.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from .codes_config import CONFIG_RULES
from .codes_tensors import TENSOR_RULES
from .finding import Effect, Rule

_REFUSED, _WRONG, _TAKEN = Effect.REFUSED, Effect.WRONG, Effect.TAKEN

_FILE_RULES: Final = (
    Rule(
        "config-missing",
        "no adapter_config.json",
        "write adapter_config.json beside the weights, as PEFT's save_pretrained does",
        {
            "peft": (_REFUSED, "looks for it on the Hub instead"),
            "vllm": (_REFUSED, "answers 404, 'No adapter found for'"),
            "sglang": (_REFUSED, "cannot read the adapter's rank"),
        },
    ),
    Rule(
        "config-invalid",
        "adapter_config.json is no JSON object",
        "write the file again; it is damaged",
        dict.fromkeys(("peft", "vllm", "sglang"), (_REFUSED, "cannot parse it")),
    ),
    Rule(
        "weights-missing",
        "no file with weights",
        "write adapter_model.safetensors",
        dict.fromkeys(("peft", "vllm", "sglang"), (_REFUSED, "finds nothing to load")),
    ),
    Rule(
        "weights-name",
        "weights under another name, or sharded over several files",
        "write one adapter_model.safetensors",
        {
            "peft": (_REFUSED, "looks for adapter_model.safetensors only"),
            "vllm": (_REFUSED, '"doesn\'t contain tensors": it reads no index and no other name'),
        },
    ),
    Rule(
        "weights-pt",
        "weights as adapter_model.pt",
        "write one adapter_model.safetensors",
        {"peft": (_REFUSED, "does not read .pt files")},
    ),
    Rule(
        "weights-pickle",
        "weights as a pickle",
        "convert them to adapter_model.safetensors: a pickle can run code when it is read",
        dict.fromkeys(("peft", "vllm", "sglang"), (_TAKEN, "reads it as a legacy format")),
    ),
    Rule(
        "weights-damaged",
        "a weights file that does not parse",
        "write the file again; it is damaged, or was read while it was being written",
        dict.fromkeys(("peft", "vllm", "sglang"), (_REFUSED, "cannot read it")),
    ),
    Rule(
        "foreign-safetensors",
        "another .safetensors file beside the weights",
        "leave nothing else that ends in .safetensors in the directory",
        {"sglang": (_WRONG, "loads every *.safetensors file, this one as well")},
    ),
    Rule(
        "foreign-weights",
        "another weights file beside the weights",
        "leave nothing else that ends in .bin or .pt in the directory",
        dict.fromkeys(
            ("peft", "vllm", "sglang"), (_TAKEN, "reads adapter_model.safetensors, not this one")
        ),
    ),
    Rule(
        "added-tokens",
        "added_tokens.json has tokens beyond the base model's vocabulary",
        "train without new tokens, or resize and save the base model with them",
        {"sglang": (_REFUSED, "rejects tokens that the base model does not have")},
    ),
    Rule(
        "name-moving",
        "a directory whose name moves from one adapter to the next",
        "give every version a name and a path of its own, such as run7-v00000012",
        {
            "vllm": (
                _WRONG,
                "caches by name: where new weights come to lie there, it computes with neither "
                "the old adapter nor the new one",
            ),
            "sglang": (
                _WRONG,
                "loads it again from its path by itself after an eviction: what is there by then",
            ),
        },
    ),
    Rule(
        "name-unsafe",
        "a directory whose name does not work as an adapter's name everywhere",
        "use 1 to 100 letters, digits, '_' and '-', beginning with a letter or digit",
        {
            "vllm": (_TAKEN, "takes it, but routers before it refuse it or read it otherwise"),
            "sglang": (_TAKEN, "takes it, but parts 'model:adapter' at a colon"),
        },
    ),
)

RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {rule.code: rule for rule in (*_FILE_RULES, *CONFIG_RULES, *TENSOR_RULES)}
)
"""Every rule by its code, in the order of reports."""
