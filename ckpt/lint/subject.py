"""An adapter as the rules see it: configuration, names and shapes of tensors, files beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ckpt.errors import ConfigError
from ckpt.peft_config import rank_of

from .base import BaseModel

VLLM_RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for ``--max-lora-rank``."""

PEFT_RANK: Final = 8
"""Rank (and alpha) that PEFT takes where the configuration names none."""

_FACTOR = re.compile(
    r"(?P<prefix>base_model\.model\.)?(?P<module>.+?)\.lora_(?P<embedding>embedding_)?"
    r"(?P<side>[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<weight>\.weight)?"
)
_EXPERT = re.compile(r"(?P<block>.+\.experts)\.(?P<number>\d+)\.(?P<projection>[^.]+)")


@dataclass(frozen=True, slots=True)
class TensorForm:
    """Dtype (safetensors code) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LintLimits:
    """How the engines are started.

    Attributes:
        vllm_max_lora_rank: ``--max-lora-rank`` of vLLM.
        sglang_max_lora_rank: ``--max-lora-rank`` of SGLang, or None if it is not known.
    """

    vllm_max_lora_rank: int = 16
    sglang_max_lora_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse what the engines would not start with.

        Raises:
            ConfigError: names the value and those that are allowed.
        """
        if self.vllm_max_lora_rank not in VLLM_RANKS:
            allowed = ", ".join(map(str, VLLM_RANKS))
            msg = f"vLLM's max_lora_rank is one of {allowed}; got {self.vllm_max_lora_rank!r}"
            raise ConfigError(msg)
        if self.sglang_max_lora_rank is not None and self.sglang_max_lora_rank < 1:
            msg = f"SGLang's max_lora_rank must be at least 1, got {self.sglang_max_lora_rank}"
            raise ConfigError(msg)


@dataclass(frozen=True, slots=True)
class Factor:
    """A tensor that is one of a module's two factors, taken apart by its key."""

    key: str
    module: str
    side: Literal["A", "B"]
    prefixed: bool
    adapter: str | None
    embedding: bool
    form: TensorForm

    @property
    def rank(self) -> int | None:
        """Its rank: A is (rank, in), B (out, rank); of embeddings as well.

        None if it is no matrix, or one for all experts of a layer, which does not tell.
        """
        if len(self.form.shape) != 2 or self.stacked is not None:
            return None
        return self.form.shape[0 if self.side == "A" else 1]

    @property
    def stacked(self) -> str | None:
        """Of a factor for all experts of a layer, the name of the adapted tensor, else None.

        PEFT wraps experts twice: the tensor that it adapts first lies inside.
        """
        if self.module.endswith(".experts.base_layer"):
            return f"{self.module.removesuffix('.base_layer')}.gate_up_proj"
        return f"{self.module}.down_proj" if self.module.endswith(".experts") else None


@dataclass(frozen=True, slots=True)
class Files:
    """The directory around an adapter.

    Attributes:
        name: the directory's own name.
        names: files in it.
        weights: the file whose tensors were read, or None.
        added_tokens: content of ``added_tokens.json``, or None.
    """

    name: str
    names: tuple[str, ...]
    weights: str | None
    added_tokens: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What is linted.

    Attributes:
        config: content of ``adapter_config.json``.
        tensors: every tensor by its key.
        base: the base model, if its configuration is known.
        limits: how the engines are started.
        factors: of ``tensors``, those that are factors; made from them.
        others: keys of the rest; made from them.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, TensorForm]
    base: BaseModel | None = None
    limits: LintLimits = LintLimits()
    factors: tuple[Factor, ...] = field(init=False)
    others: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Take the keys apart once for all rules."""
        factors, others = [], []
        for key, form in self.tensors.items():
            factor = parse_factor(key, form)
            if factor is None:
                others.append(key)
            else:
                factors.append(factor)
        object.__setattr__(self, "factors", tuple(factors))
        object.__setattr__(self, "others", tuple(others))

    @property
    def rank(self) -> int:
        """The rank that the configuration claims, or PEFT's own where it claims none."""
        rank = self.config.get("r")
        return int(rank) if rank is not None and is_rank(rank) else PEFT_RANK

    def rank_for(self, module: str) -> int:
        """The rank that the configuration claims for a module; a pattern that is none is void."""
        try:
            return rank_of({**self.config, "r": self.rank}, module)
        except (re.error, TypeError, ValueError, AttributeError):
            return self.rank


def is_rank(value: object) -> bool:
    """Whether a value can be a rank."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def parse_factor(key: str, form: TensorForm) -> Factor | None:
    """A key taken apart as leniently as any loader does, or None for what is no factor."""
    match = _FACTOR.fullmatch(key)
    if match is None or (match["weight"] is None and match["embedding"] is None):
        return None
    return Factor(
        key=key,
        module=match["module"],
        side="A" if match["side"] == "A" else "B",
        prefixed=match["prefix"] is not None,
        adapter=match["adapter"],
        embedding=match["embedding"] is not None,
        form=form,
    )


def parse_expert(module: str) -> tuple[str, int, str] | None:
    """(the block's name, the expert's number, the projection) of an expert's module."""
    match = _EXPERT.fullmatch(module)
    return None if match is None else (match["block"], int(match["number"]), match["projection"])
