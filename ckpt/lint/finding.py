"""A rule, what each engine does about what it describes, and a finding of it in an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, TypeAlias

Engine: TypeAlias = Literal["peft", "vllm", "sglang"]

ENGINES: Final[tuple[Engine, ...]] = ("peft", "vllm", "sglang")
"""Whoever loads adapters and is known here; the order of every report."""


class Effect(StrEnum):
    """What an engine does about an adapter."""

    REFUSED = "refused"
    """It says no and goes on serving."""
    WRONG = "silently wrong"
    """It takes the adapter and computes something else than was trained, often the bare base."""
    DIES = "server dies"
    """It takes the adapter, and the first request for it ends the server."""
    TAKEN = "taken"
    """It computes what was trained; still worth knowing."""


class Severity(StrEnum):
    """Whether the adapter must not go to the engine, or whether somebody should look."""

    error = "error"
    warning = "warning"


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that can be wrong with an adapter.

    Attributes:
        code: its name in reports; never changes.
        title: what is wrong, in a few words.
        remedy: what to do about it.
        effects: for each engine that minds, what it does, and in which words. An engine that is
            missing here takes such an adapter and computes what was trained.
    """

    code: str
    title: str
    remedy: str
    effects: Mapping[Engine, tuple[Effect, str]]


@dataclass(frozen=True, slots=True)
class Finding:
    """That an adapter breaks a rule, and what one engine does about it.

    Attributes:
        code: the rule's name.
        engine: who minds.
        severity: ``error``, or ``warning`` where the engine takes it, or where the adapter alone
            does not tell for certain (the base model's configuration would).
        effect: what the engine does.
        where: the first tensor, field or file that breaks the rule.
        count: how many do.
        message: what was found, and what the engine makes of it.
        remedy: what to do.
    """

    code: str
    engine: Engine
    severity: Severity
    effect: Effect
    where: str
    count: int
    message: str
    remedy: str


def findings(
    rule: Rule, wheres: Sequence[str], detail: str, *, certain: bool = True
) -> Iterator[Finding]:
    """One finding for every engine that minds; none if nothing breaks the rule.

    Args:
        rule: the rule that is broken.
        wheres: the tensors, fields or files that break it.
        detail: what was found in the first of them.
        certain: whether the adapter shows it beyond doubt.
    """
    if not wheres:
        return
    more = f" (and {len(wheres) - 1} more)" if len(wheres) > 1 else ""
    for engine, (effect, words) in rule.effects.items():
        error = certain and effect is not Effect.TAKEN
        yield Finding(
            code=rule.code,
            engine=engine,
            severity=Severity.error if error else Severity.warning,
            effect=effect,
            where=wheres[0],
            count=len(wheres),
            message=f"{detail}{more}: {words}",
            remedy=rule.remedy,
        )
