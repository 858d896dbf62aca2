"""A notice that the process is about to be ended: one last save, on all ranks, in time.

The signal's handler does nothing but note the moment. The training loop asks at a point that
every rank passes, the ranks agree there, and so they all leave after the same step, also when
only one of them was told.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from .errors import CkptError, ConfigError
from .vote import Board, RemoteFailure

logger = logging.getLogger(__name__)

DEADLINE_S = 25.0
"""Schedulers commonly kill 30 s after the notice."""


class Preemption:
    """What one rank knows of the end that is coming.

    Args:
        board: the caller thread's access to the other ranks.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self._deadline = DEADLINE_S
        self._noted: float | None = None
        self._until: float | None = None
        self._asked = 0
        self._previous: dict[signal.Signals, Any] = {}

    def install(self, signals: tuple[signal.Signals, ...], deadline: float) -> None:
        """Note the given signals from now on.

        Raises:
            ConfigError: not on the main thread, a signal that cannot be handled, or a deadline
                that is not positive.
        """
        if not deadline > 0:
            msg = f"deadline must be a positive number of seconds, got {deadline!r}"
            raise ConfigError(msg)
        if threading.current_thread() is not threading.main_thread():
            msg = "save_on_signal() must be called on the main thread; Python handles signals there"
            raise ConfigError(msg)
        self._deadline = deadline
        for number in signals:
            try:
                previous = signal.signal(number, self._handle)
            except (OSError, ValueError) as error:
                msg = f"{number!r} cannot be handled: {error}"
                raise ConfigError(msg) from error
            self._previous.setdefault(number, previous)

    def request(self) -> None:
        """Behave as if a signal had come (from any thread)."""
        if self._noted is None:
            self._noted = time.monotonic()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.request()

    def agreed(self) -> bool:
        """Whether any rank was told, as all ranks see it; every rank asks at the same point.

        Raises:
            SaveAborted: a rank is gone or did not ask in time.
        """
        if self._until is not None:
            return True
        left = self._left_here()
        if self._board.world > 1:
            left = self._agree(left)
        if left is None:
            return False
        self._until = time.monotonic() + left
        logger.warning("asked to stop; %.1f s are left for the last save", left)
        return True

    def left(self) -> float:
        """Seconds until the deadline, at least 0; all of them while no end is in sight."""
        if self._until is None:
            return self._deadline
        return max(0.0, self._until - time.monotonic())

    def release(self) -> None:
        """Put the handlers back that were there before."""
        for number, previous in self._previous.items():
            # None: a handler that was not set from Python, which cannot be put back from it.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)
        self._previous.clear()

    def _left_here(self) -> float | None:
        if self._noted is None:
            return None
        return max(0.0, self._noted + self._deadline - time.monotonic())

    def _agree(self, left: float | None) -> float | None:
        board, topic = self._board, f"stop/{self._asked}"
        board.answer(topic, left)
        if board.rank == 0:
            try:
                told = [value for value in board.gather(topic) if value is not None]
            except (CkptError, RemoteFailure) as error:
                board.abort(topic, error)
                raise
            board.decide(topic, min(told, default=None))
            # All ranks have answered this one, so nobody looks at the one before it any more.
            board.forget([f"stop/{self._asked - 1}"])
            decided: float | None = min(told, default=None)
        else:
            verdict = board.verdict(topic)
            if verdict.failure is not None:
                raise verdict.failure.rebuild()
            decided = verdict.value
        self._asked += 1
        return decided
