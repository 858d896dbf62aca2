"""What a command that goes on for long says of itself with ``--json``: one object a line.

The log stays on standard error. Every line has ``event`` and ``at``, the time in UTC.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from threading import Thread
from typing import Any, Final, TypeAlias

from .cli_console import write_line

Look: TypeAlias = Callable[[], tuple[str, Mapping[str, Any]] | None]

LOOK_S: Final = 0.2
"""Seconds between looks at a state that is told when it has changed."""


class Events:
    """Writes events to standard output, or nothing.

    Args:
        wanted: whether ``--json`` was given.
    """

    def __init__(self, *, wanted: bool) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()

    def say(self, event: str, **facts: Any) -> None:
        """Something happened."""
        if not self._wanted:
            return
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            write_line({"event": event, "at": at, **facts})

    def follow(self, look: Look, stop: threading.Event, *, once: bool = False) -> Thread | None:
        """Tell a state whenever it is another than it was, from a thread, until ``stop`` is set.

        Args:
            look: gives the event and its facts, or None as long as there is nothing to tell.
            stop: ends the thread, after a last look.
            once: the first thing that is told is all there is to tell.

        Returns:
            The thread, to be joined after ``stop``; None if nobody listens.
        """
        if not self._wanted:
            return None
        thread = Thread(target=self._follow, args=(look, stop, once), daemon=True)
        thread.start()
        return thread

    def _follow(self, look: Look, stop: threading.Event, once: bool) -> None:
        told: tuple[str, Mapping[str, Any]] | None = None
        while True:
            last = stop.wait(LOOK_S)
            found = look()
            if found is not None and found != told:
                self.say(found[0], **found[1])
                told = found
                if once:
                    return
            if last:
                return
