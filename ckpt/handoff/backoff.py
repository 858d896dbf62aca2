"""How long to wait after a failure, and what has failed lately."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


class Backoff:
    """Pauses that double from failure to failure, with jitter, up to a cap.

    Args:
        first_s: seconds of the first pause, before jitter.
        cap_s: longest pause.
    """

    def __init__(self, first_s: float, cap_s: float) -> None:
        self._first_s, self._cap_s = first_s, cap_s
        self._failures = 0

    def failed(self) -> float:
        """Note a failure; the seconds to wait now."""
        pause = pause_after(self._failures, self._first_s, self._cap_s)
        self._failures += 1
        return pause

    def succeeded(self) -> None:
        """Begin anew."""
        self._failures = 0


def pause_after(failures: int, first_s: float, cap_s: float) -> float:
    """Seconds to wait after ``failures`` earlier ones: a half to the whole of the doubled pause.

    The jitter keeps many readers of one store from coming back at the same moment.
    """
    pause = min(cap_s, first_s * 2.0 ** min(failures, 60))
    return pause * random.uniform(0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Setback:
    """Why a version is passed over for now.

    Attributes:
        reason: for people.
        count: how often it failed.
        until: when it is tried again, by the clock of :class:`Setbacks`.
    """

    reason: str
    count: int
    until: float


class Setbacks:
    """Versions that failed lately, each with the time of its next try; safe between threads.

    Args:
        first_s: seconds until the first repetition.
        cap_s: longest pause.
        clock: seconds that only grow.
    """

    def __init__(
        self, first_s: float, cap_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first_s, self._cap_s, self._clock = first_s, cap_s, clock
        self._mutex = threading.Lock()
        self._known: dict[str, Setback] = {}

    def add(self, name: str, reason: str, cap_s: float | None = None) -> Setback:
        """Note that a version failed; the record, with its count.

        Args:
            name: of the version.
            reason: for people.
            cap_s: longest pause, if it is another one for this reason.
        """
        with self._mutex:
            count = self._known[name].count if name in self._known else 0
            pause = pause_after(count, self._first_s, self._cap_s if cap_s is None else cap_s)
            record = Setback(reason, count + 1, self._clock() + pause)
            self._known[name] = record
            return record

    def waiting(self, name: str) -> bool:
        """Whether a version is not to be tried yet."""
        with self._mutex:
            record = self._known.get(name)
            return record is not None and self._clock() < record.until

    def forget(self, name: str) -> None:
        """It works now."""
        with self._mutex:
            self._known.pop(name, None)

    def reasons(self) -> dict[str, str]:
        """What is known to have failed and has not worked since, by name."""
        with self._mutex:
            return {name: record.reason for name, record in sorted(self._known.items())}
