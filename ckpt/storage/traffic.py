"""How much a store was asked for and how many bytes went each way."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """A reading of a store's meter; the difference of two readings is what lay between.

    Attributes:
        requests: requests sent, repetitions included (POSIX: operations on files).
        sent: bytes of content written; headers and the like are not counted.
        received: bytes of content read.
    """

    requests: int = 0
    sent: int = 0
    received: int = 0

    def __sub__(self, earlier: Traffic) -> Traffic:
        """What was added since an earlier reading of the same meter."""
        return Traffic(
            self.requests - earlier.requests,
            self.sent - earlier.sent,
            self.received - earlier.received,
        )

    @property
    def moved(self) -> int:
        """Bytes of content in both directions."""
        return self.sent + self.received


class Meter:
    """Adds up the traffic of one store, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Traffic()

    def __reduce__(self) -> tuple[type[Meter], tuple[()]]:
        """A copy in another process counts from zero."""
        return Meter, ()

    def add(self, *, requests: int = 0, sent: int = 0, received: int = 0) -> None:
        """Count what one request did."""
        with self._lock:
            old = self._total
            self._total = Traffic(old.requests + requests, old.sent + sent, old.received + received)

    def read(self) -> Traffic:
        """All there was so far."""
        with self._lock:
            return self._total
