"""Server-sent events: what is new at a root, as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec

from ckpt.errors import DamagedError
from ckpt.wire import VersionRow

QUIET_S: Final = 45.0
"""The service says every 15 seconds that it is there; longer silence is a lost connection."""
_MOST: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Event:
    """Something new.

    Attributes:
        kind: ``version`` or ``step``.
        name: of the version, or of the step's directory.
        version: the version, for that kind.
        step: number and writer's epoch, for that kind.
    """

    kind: str
    name: str
    version: VersionRow | None = None
    step: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    step: int
    epoch: int


class EventParser:
    """Makes events of the lines of a ``text/event-stream``."""

    def __init__(self) -> None:
        self.last_id: str | None = None
        self.ended = False
        self._kind = ""
        self._data: list[str] = []
        self._size = 0

    def feed(self, line: str) -> Iterator[Event]:
        """The events that a line completes: none or one.

        Raises:
            DamagedError: the stream is none of this API.
        """
        if line:
            self._field(line)
            return
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data, self._size = "", [], 0
        if kind == "bye":
            self.ended = True
        elif kind and data:
            event = _event(kind, data)
            if event is not None:
                yield event

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        self._size += len(line)
        if self._size > _MOST:
            raise DamagedError(f"an event is longer than {_MOST} characters")
        if name == "event":
            self._kind = value
        elif name == "data":
            self._data.append(value)
        elif name == "id":
            self.last_id = value


def _event(kind: str, data: str) -> Event | None:
    try:
        if kind == "version":
            version = msgspec.json.decode(data, type=VersionRow)
            return Event(kind, version.name, version=version)
        if kind == "step":
            step = msgspec.json.decode(data, type=_Step)
            return Event(kind, step.name, step=(step.step, step.epoch))
    except msgspec.MsgspecError as error:
        raise DamagedError(f"not an event of this API: {error}") from error
    return None  # of a newer service
