"""Modules that an engine stacks into one: what it needs of them together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from .base import EXPERTS_3D, EXPERTS_STACKED
from .codes_tensors import TENSOR_RULES
from .finding import Finding, findings
from .subject import Subject, parse_expert

_RULES: Final = {rule.code: rule for rule in TENSOR_RULES}

_STACKS: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_STACK_OF: Final = {name: stack for stack in _STACKS for name in stack}


def group_findings(subject: Subject) -> Iterator[Finding]:
    """Stacks that are not whole, and ranks that differ in or between them.

    SGLang's rules: a missing k_proj or up_proj is filled with zeros, a missing q_proj, v_proj or
    gate_proj is not.
    """
    blocks: dict[str, dict[str, int]] = {}
    for factor in subject.factors:
        if parse_expert(factor.module) is None and not factor.embedding:
            block, _, name = factor.module.rpartition(".")
            blocks.setdefault(block, {})[name] = factor.rank or 0
    broken: dict[str, list[str]] = {}
    for block, names in blocks.items():
        for code, there, lacking in (
            ("group-q-without-v", "q_proj", "v_proj"),
            ("group-up-without-gate", "up_proj", "gate_proj"),
            ("group-q-a-without-kv-a", "q_a_proj", "kv_a_proj_with_mqa"),
        ):
            if there in names and lacking not in names:
                broken.setdefault(code, []).append(f"{block}.{there}")
        if "q_proj" not in names:
            first = next((name for name in ("k_proj", "v_proj") if name in names), None)
            if first is not None:
                broken.setdefault("group-without-q", []).append(f"{block}.{first}")
    for code, modules in broken.items():
        detail = f"{modules[0]!r} is adapted without the module that it is stacked with"
        yield from findings(_RULES[code], modules, detail)
    yield from _mixed(subject, blocks)


def _mixed(subject: Subject, blocks: Mapping[str, Mapping[str, int]]) -> Iterator[Finding]:
    """Ranks that the configuration explains by a pattern, and that are not those of ``r``."""
    if not subject.config.get("rank_pattern"):
        return
    stacked: list[str] = []
    single: list[str] = []
    for block, names in blocks.items():
        for name, rank in names.items():
            module = f"{block}.{name}"
            if rank == subject.rank or rank != subject.rank_for(module):
                continue  # of r, or a lie, which another rule tells
            mates = {names[mate] for mate in _STACK_OF.get(name, ()) if mate in names}
            (stacked if len(mates) > 1 else single).append(module)
    for code, modules in (("mixed-rank-group", stacked), ("mixed-rank", single)):
        detail = ""
        if modules:
            detail = f"{modules[0]!r} has rank {subject.rank_for(modules[0])}, r is {subject.rank}"
        yield from findings(_RULES[code], modules, detail)


def expert_findings(subject: Subject) -> Iterator[Finding]:
    """The experts of a mixture: fused, missing, or of unequal ranks."""
    native = subject.base is not None and subject.base.model_type in EXPERTS_3D
    fused = [f for f in subject.factors if f.stacked is not None]
    if not native:
        detail = f"{fused[0].key!r} is for all experts of a layer" if fused else ""
        certain = subject.base is not None
        keys = [factor.key for factor in fused]
        yield from findings(_RULES["moe-fused-experts"], keys, detail, certain=certain)
    ranks: dict[str, dict[str, dict[int, int]]] = {}
    for factor in subject.factors:
        parsed = parse_expert(factor.module)
        if parsed is not None:
            block, number, projection = parsed
            ranks.setdefault(block, {}).setdefault(projection, {})[number] = factor.rank or 0
    if subject.base is not None and subject.base.model_type in EXPERTS_STACKED:
        yield from _experts("moe-experts-single", list(ranks), "has an adapter for each expert")
    missing: list[str] = []
    unequal: list[str] = []
    for block, projections in ranks.items():
        numbers = {number for experts in projections.values() for number in experts}
        total = max(numbers) + 1
        if subject.base is not None and subject.base.experts is not None:
            total = max(total, subject.base.experts)
        for projection, experts in projections.items():
            missing += [f"{block}.{n}.{projection}" for n in range(total) if n not in experts]
            if len(set(experts.values())) > 1:
                unequal.append(f"{block}.*.{projection}")
    yield from _experts("moe-experts-missing", missing, "has no factors, but other experts have")
    yield from _experts("moe-experts-ranks", unequal, "has experts of different ranks")


def _experts(code: str, wheres: Sequence[str], why: str) -> Iterator[Finding]:
    return findings(_RULES[code], wheres, f"{wheres[0]!r} {why}" if wheres else "")
