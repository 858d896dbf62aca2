"""What a save does while both arena slots are in use, agreed on by all ranks before any copies."""

from __future__ import annotations

import logging
from typing import Literal

from .errors import CkptError, SaveAborted
from .save import EchoError
from .vote import Board, RemoteFailure

logger = logging.getLogger(__name__)

WhenBusy = Literal["block", "skip", "latest"]
"""``block`` waits for a slot; ``skip`` leaves the new save out; ``latest`` gives up the newest
save that still waits its turn, in favour of the new one."""

Choice = Literal["go", "skip", "drop"]


def busy_topic(seq: int) -> str:
    """Topic of the agreement for a manager's ``seq``-th save."""
    return f"busy/{seq}"


class BusyRule:
    """Agrees over ranks; costs one round trip to the ranks' store, and none on a single rank.

    Args:
        board: the caller thread's access to the other ranks.
        mode: ``"skip"`` or ``"latest"``; ``"block"`` needs no agreement.
    """

    def __init__(self, board: Board, mode: WhenBusy) -> None:
        self._board = board
        self._mode = mode

    def choose(self, seq: int, *, free: bool) -> Choice:
        """What all ranks do with this save.

        Args:
            seq: number of the call, equal on all ranks.
            free: whether this rank has a free slot.

        Returns:
            ``"go"``: take a slot (and wait for it: at least one rank has one, so the others are
            about to). ``"skip"``: leave the save out. ``"drop"``: no rank has a slot; give up
            the newest save that waits.

        Raises:
            SaveAborted: a rank is gone, or failed before it came here.
            EchoError: a rank was raising an earlier error.
        """
        if self._mode == "block":
            return "go"
        board, topic = self._board, busy_topic(seq)
        if board.world == 1:
            return self._decide([free])
        board.answer(topic, free)
        if board.rank == 0:
            try:
                choice = self._decide(board.gather(topic))
            except (CkptError, RemoteFailure) as error:
                failure = board.abort(topic, error)
                if failure.echo:
                    raise EchoError(failure.message) from None
                raise failure.rebuild() from None
            board.decide(topic, choice)
            # All ranks have answered this one, so nobody looks at the one before it any more.
            board.forget([busy_topic(seq - 1)])
            return choice
        verdict = board.verdict(topic)
        if verdict.failure is not None:
            if verdict.failure.echo:
                raise EchoError(verdict.failure.message)
            raise verdict.failure.rebuild()
        decided: Choice = verdict.value
        return decided

    def refuse(self, seq: int, error: BaseException) -> None:
        """Tell the others at once that this rank raises an earlier error and does not save."""
        if self._mode == "block" or self._board.world == 1:
            return
        try:
            self._board.fail(busy_topic(seq), error, echo=True)
            if self._board.rank == 0:
                self._board.abort(busy_topic(seq), error, echo=True)
        except SaveAborted as problem:
            # The other ranks are gone; the caller has the error that matters.
            logger.warning("could not tell the other ranks: %s", problem)

    def _decide(self, free: list[bool]) -> Choice:
        if all(free):
            return "go"
        if self._mode == "skip":
            return "skip"
        # Where a rank has a slot, the save before this one has been decided, and the other
        # ranks are about to hear of it: waiting for them is short, and loses nothing.
        return "go" if any(free) else "drop"
