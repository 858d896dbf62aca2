"""How much one caller, and all of them together, may have at a time."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_MOST_CALLERS: Final = 10_000
"""Callers whose budget is remembered; the ones that were quiet longest are forgotten first."""


class Busy(Exception):
    """Something is taken as often as it may be; the message is for the caller.

    Args:
        message: what is taken.
        retry_s: after how many seconds a new try makes sense.
    """

    def __init__(self, message: str, retry_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class RateLimit:
    """A budget of requests for each caller, which fills up with time.

    Args:
        per_second: requests that come back to it in a second.
        burst: requests that it holds at most.
        clock: seconds, for tests.
    """

    def __init__(
        self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate, self._burst, self._clock = per_second, float(burst), clock
        self._budgets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, caller: str) -> float:
        """Take one request from a caller's budget.

        Returns:
            0, or the seconds after which the next one will be there.
        """
        now = self._clock()
        left, since = self._budgets.pop(caller, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._rate)
        wait = 0.0 if left >= 1.0 else (1.0 - left) / self._rate
        self._budgets[caller] = (left if wait else left - 1.0, now)
        if len(self._budgets) > _MOST_CALLERS:
            self._budgets.popitem(last=False)
        return wait


class Slots:
    """Things of which only so many may be had at a time; nobody waits for one.

    Args:
        what: for messages.
        count: how many there are.
    """

    def __init__(self, what: str, count: int) -> None:
        self._what, self._count = what, count
        self.taken = 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """Have one for a while.

        Raises:
            Busy: there is none left.
        """
        if self.taken >= self._count:
            raise Busy(f"{self._count} {self._what} are open, the most there may be; try later")
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
