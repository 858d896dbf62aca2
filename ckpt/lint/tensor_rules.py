"""What the names and shapes of tensors give away; no value is looked at."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from ckpt.dtypes import TORCH_DTYPES

from .base import EMBEDDING_LORA, NO_EMBEDDING_LORA
from .codes_tensors import TENSOR_RULES
from .config_rules import bias_of, saved_modules
from .finding import Finding, findings
from .group_rules import expert_findings, group_findings
from .subject import Factor, Subject, is_rank

_RULES: Final = {rule.code: rule for rule in TENSOR_RULES}

_USUAL_DTYPES: Final = frozenset({"BF16", "F16", "F32"})
_FUSED: Final = (".qkv_proj", ".gate_up_proj")
_COPIES: Final = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
"""The base model's own tensors, which PEFT saves beside adapted embeddings; engines skip them."""

_SAVED: Final = re.compile(r"(.*\.)?(embed_tokens|lm_head|wte|embed_in|embed_out)\.weight")


def tensor_findings(subject: Subject) -> Iterator[Finding]:
    """Everything that keys, dtypes and shapes show."""
    if not subject.factors:
        yield from _say("empty", ["adapter_model"], "the file has no lora_A and no lora_B")
    checks: tuple[Callable[[Subject], Iterator[Finding]], ...] = (
        _grammar,
        _strangers,
        _pairs,
        _shapes,
        group_findings,
        expert_findings,
        _places,
        _against_base,
        _dtypes,
    )
    for check in checks:
        yield from check(subject)


def _say(
    code: str, wheres: Sequence[str], detail: str, *, certain: bool = True
) -> Iterator[Finding]:
    return findings(_RULES[code], wheres, detail, certain=certain)


def _each(
    code: str, factors: Iterable[Factor], why: str, *, certain: bool = True
) -> Iterator[Finding]:
    """A finding on tensors; ``why`` is said of the first one's key."""
    keys = [factor.key for factor in factors]
    yield from _say(code, keys, f"{keys[0]!r} {why}" if keys else "", certain=certain)


def _grammar(subject: Subject) -> Iterator[Finding]:
    bare = [factor for factor in subject.factors if not factor.prefixed]
    yield from _each("key-prefix", bare, "does not begin with base_model.model.")
    named = [factor for factor in subject.factors if factor.adapter is not None]
    why = f"has the adapter name {named[0].adapter!r} in it" if named else ""
    yield from _each("key-adapter-name", named, why)
    seen: set[tuple[str, str, bool]] = set()
    twice = []
    for factor in subject.factors:
        place = (factor.module, factor.side, factor.embedding)
        if place in seen:
            twice.append(factor)
        seen.add(place)
    yield from _each("key-twice", twice, "is the same factor as another key")


def _strangers(subject: Subject) -> Iterator[Finding]:
    """Tensors that are no factors and that no rule on the configuration has named already."""
    whole = [key for key in subject.others if _SAVED.fullmatch(key)]
    yield from _say("saved-embedding", whole, f"{whole[0]!r} is there" if whole else "")
    saved = saved_modules(subject.config)
    unknown = [
        key
        for key in subject.others
        if key not in whole
        and not key.endswith(_COPIES)
        and bias_of(key) is None
        and "lora_magnitude_vector" not in key
        and not any(f".{name}." in f".{key}" for name in saved)
    ]
    yield from _say("key-unknown", unknown, f"{unknown[0]!r} is there" if unknown else "")


def _pairs(subject: Subject) -> Iterator[Finding]:
    sides: dict[tuple[str, bool], dict[str, Factor]] = {}
    for factor in subject.factors:
        sides.setdefault((factor.module, factor.embedding), {})[factor.side] = factor
    lonely = [next(iter(pair.values())) for pair in sides.values() if len(pair) == 1]
    yield from _each("missing-a", [f for f in lonely if f.side == "B"], "has no lora_A beside it")
    yield from _each("missing-b", [f for f in lonely if f.side == "A"], "has no lora_B beside it")


def _shapes(subject: Subject) -> Iterator[Finding]:
    odd = [f for f in subject.factors if len(f.form.shape) != 2 or 0 in f.form.shape]
    why = f"has shape {list(odd[0].form.shape)}" if odd else ""
    yield from _each("tensor-shape", odd, why)
    claimed = subject.config.get("r")
    wrong = [f for f in subject.factors if f.rank not in (None, subject.rank_for(f.module))]
    if wrong and (claimed is None or is_rank(claimed)):
        want = subject.rank_for(wrong[0].module)
        yield from _each("tensor-rank", wrong, f"has rank {wrong[0].rank}, not {want}")
    uneven = [f for f in subject.factors if _leftover(f, subject)]
    if uneven:
        size = uneven[0].form.shape[0 if uneven[0].side == "A" else 1]
        why = f"has {size} ranks of all experts, no multiple of {_claimed(uneven[0], subject)}"
        yield from _each("tensor-rank", uneven, why)
    ranks = {factor.rank: factor.key for factor in subject.factors if factor.rank is not None}
    ranks.setdefault(subject.rank, "r")
    highest = max(ranks)
    limits = subject.limits
    for code, limit in (
        ("vllm-max-rank", limits.vllm_max_lora_rank),
        ("sglang-max-rank", limits.sglang_max_lora_rank),
    ):
        if limit is not None and highest > limit:
            yield from _say(code, [ranks[highest]], f"rank {highest}, limit {limit}")


def _claimed(factor: Factor, subject: Subject) -> int:
    return subject.rank_for(factor.stacked or factor.module)


def _leftover(factor: Factor, subject: Subject) -> bool:
    """Whether a factor for all experts is not made of whole ones of the claimed rank."""
    if factor.stacked is None or len(factor.form.shape) != 2:
        return False
    return factor.form.shape[0 if factor.side == "A" else 1] % _claimed(factor, subject) != 0


def _places(subject: Subject) -> Iterator[Finding]:
    """Whether a name leads to a module, as far as names alone tell."""
    fused = [f for f in subject.factors if f.module.endswith(_FUSED)]
    native = None if subject.base is None else subject.base.fused
    if native is not True:
        yield from _each("fused-projection", fused, "is fused", certain=native is False)
    ends = [
        f for f in subject.factors if f.embedding or f.module.endswith(("lm_head", "embed_tokens"))
    ]
    family = None if subject.base is None else subject.base.model_type
    if family not in EMBEDDING_LORA:
        certain = family in NO_EMBEDDING_LORA
        yield from _each("embedding-lora", ends, "is on the embedding or head", certain=certain)
    if subject.base is None or subject.base.linears is None:
        short = [f for f in subject.factors if f.module.startswith("layers.")]
        causal = subject.config.get("task_type") == "CAUSAL_LM"
        why = "is not below the model's own name (model.layers.…)"
        yield from _each("key-path", short, why, certain=causal)


def _against_base(subject: Subject) -> Iterator[Finding]:
    base = subject.base
    if base is None:
        return
    judged: dict[str, list[Factor]] = {}
    for factor in subject.factors:
        judged.setdefault(base.standing(factor.module), []).append(factor)
    known = judged.get("known", [])
    yield from _each(
        "layer-range", judged.get("layer", []), f"is beyond layer {(base.layers or 0) - 1}"
    )
    yield from _each(
        "key-path", judged.get("elsewhere", []), f"is no path in a {base.model_type} model"
    )
    absent = [f for f in judged.get("absent", []) if not f.module.endswith(_FUSED)]
    yield from _each("module-absent", absent, f"is on a module that {base.model_type} has not")
    misfits, why = [], ""
    for factor in known:
        shape = base.shape_of(factor.module)
        if shape is None or factor.embedding or len(factor.form.shape) != 2:
            continue
        want = shape[0] if factor.side == "A" else shape[1]
        have = factor.form.shape[1 if factor.side == "A" else 0]
        if have != want:
            why = why or f"has {have} {'columns' if factor.side == 'A' else 'rows'}, not {want}"
            misfits.append(factor)
    yield from _each("base-shape", misfits, why)


def _dtypes(subject: Subject) -> Iterator[Finding]:
    numbers, unusual = [], []
    for factor in subject.factors:
        dtype = TORCH_DTYPES.get(factor.form.dtype)
        if dtype is None or not dtype.is_floating_point:
            numbers.append(factor)
        elif factor.form.dtype not in _USUAL_DTYPES:
            unusual.append(factor)
    for code, factors in (("dtype", numbers), ("dtype-unusual", unusual)):
        yield from _each(code, factors, f"is {factors[0].form.dtype}" if factors else "")
    dtypes = sorted({factor.form.dtype for factor in subject.factors})
    if len(dtypes) > 1:
        yield from _say("dtype-mixed", [subject.factors[0].key], f"dtypes {', '.join(dtypes)}")
