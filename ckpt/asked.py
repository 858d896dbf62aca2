"""What a restore is asked for: checked on every rank, and the same on all of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from .errors import CkptError, PlanError
from .layout import check_step
from .state_parts import Part, check_parts
from .vote import Board


@dataclass(frozen=True, slots=True)
class Asked:
    """What the caller wants.

    Attributes:
        step: a step number, or None for the newest that verifies.
        strict: whether a difference in names is refused.
        parts: the parts to restore.
    """

    step: int | None
    strict: bool
    parts: frozenset[Part]


PARTED: Final = "model as a list of stages"
"""What ranks must also agree on, in the words of the message that says so."""


def ask(
    board: Board,
    topic: str,
    step: int | None,
    *,
    strict: bool,
    parts: Collection[str] | None,
    parted: bool,
) -> Asked:
    """Check the arguments and tell rank 0 what this rank wants.

    Raises:
        ConfigError: an argument that cannot work; no other rank waits for this one then.
    """
    try:
        if step is not None:
            check_step(step)
        asked = Asked(step, strict, check_parts(parts))
    except CkptError as error:
        refuse(board, topic, error)
        raise
    said = {"step": step, "strict": strict, "parts": sorted(asked.parts), PARTED: parted}
    board.answer(f"{topic}/asked", said)
    return asked


def refuse(board: Board, topic: str, error: CkptError) -> None:
    """Tell the other ranks that this one does not even begin."""
    board.fail(f"{topic}/asked", error)
    if board.rank == 0:
        board.abort(f"{topic}/0/proposal", error)


def compare(board: Board, topic: str) -> None:
    """Rank 0: refuse an exchange in which ranks want different things.

    Raises:
        PlanError: names the first difference.
        RemoteFailure: a rank refused its arguments.
        VoteTimeout: a rank did not ask in time.
    """
    answers: list[Mapping[str, Any]] = board.gather(f"{topic}/asked")
    for rank, answer in enumerate(answers):
        for name, value in answers[0].items():
            if answer.get(name) != value:
                msg = (
                    f"ranks disagree about what to restore: {name} is {value} on rank 0 and "
                    f"{answer.get(name)} on rank {rank}"
                )
                raise PlanError(msg)
