"""What saves cost and what was deleted, as small records in the root: the *timeline*.

A *segment* is one file of ``metrics/``: what one process (a trainer's rank 0, an uploader, ``ckpt
prune``) told since it began, bounded in size. Segments are hints for people. Nothing that a
restore, a publish or retention does depends on them; losing them all loses a plot.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from .envelope import Fields, seal, unseal
from .errors import DamagedError
from .layout import check_attempt, parse_step_dir, parse_version_name

SEGMENT_FORMAT: Final = "ckpt.timeline"
SCHEMA: Final = 1

MAX_RECORDS: Final = 128
"""Records in one segment; a process that has more begins another one."""
MAX_BYTES: Final = 256 * 1024
"""A file above this is not read."""
MAX_OPEN: Final = 8
MAX_NAMES: Final = 200
"""Deleted steps and versions that one record names; it counts the others."""
MAX_PROBLEM: Final = 500
MAX_EXTRA: Final = 24
MAX_NUMBER: Final = 1e15
"""No time or size of a save is above this (30 000 years, a petabyte)."""
_EXTRA_NAME: Final = 64

NUMBERS: Final = (
    "stall_ms",
    "wait_ms",
    "plan_ms",
    "copy_ms",
    "write_ms",
    "commit_ms",
    "publish_ms",
    "publish_lag_ms",
    "total_ms",
    "stage_bytes",
    "queue_depth",
    "store_requests",
    "store_bytes",
)
"""What a save's record may say in numbers; the units are those of :class:`~ckpt.SaveMetrics`."""

Outcome: TypeAlias = Literal["done", "skipped", "failed"]
Kind: TypeAlias = Literal["save", "publish"]
_OUTCOMES: Final = ("done", "skipped", "failed")
_KINDS: Final = ("save", "publish")


@dataclass(frozen=True, slots=True)
class OpenSave:
    """A save that was under way when its segment was written.

    Attributes:
        step: its step number, or None for a publish without one.
        kind: ``save`` (a step, with or without a version) or ``publish`` (a version alone).
        attempt: its attempt id.
        since: when ``save()`` was called: ISO 8601, UTC.
    """

    step: int | None
    kind: Kind
    attempt: str
    since: str


@dataclass(frozen=True, slots=True)
class SaveRecord:
    """What became of one save, and what it cost.

    Attributes:
        at: when it had ended: ISO 8601, UTC.
        step: its step number, or None for a publish without one.
        kind: ``save`` (a step, with or without a version) or ``publish`` (a version alone).
        attempt: its attempt id.
        outcome: ``done``: the step exists, or the version if that was all; ``skipped``: left out by
            ``when_busy``; ``failed``.
        version: the version that was published with it, or None.
        problem: what went wrong, in one line. A step may be ``done`` and its version not.
        world: ranks that saved together.
        numbers: those of :data:`NUMBERS` that are known. With several ranks, times up to
            ``write_ms`` are those of the slowest rank, ``stage_bytes`` is the sum, the rest is
            rank 0's.
        slowest: which rank was slowest, by the number's name.
        extra: more numbers (see ``SaveMetrics.extra``).
        removed: bare names of the steps and versions that retention deleted after it.
        removed_count: how many it deleted.
    """

    at: str
    step: int | None
    kind: Kind
    attempt: str
    outcome: Outcome
    version: str | None = None
    problem: str | None = None
    world: int = 1
    numbers: Mapping[str, float] = field(default_factory=dict)
    slowest: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    removed: tuple[str, ...] = ()
    removed_count: int = 0


@dataclass(frozen=True, slots=True)
class Removal:
    """Steps and versions that were deleted on their own, not after a save.

    Attributes:
        at: ISO 8601, UTC.
        names: their bare names, at most :data:`MAX_NAMES`.
        count: how many there were.
    """

    at: str
    names: tuple[str, ...]
    count: int


@dataclass(frozen=True, slots=True)
class Segment:
    """What one process told.

    Attributes:
        source: what it is: ``trainer``, ``uploader``, ``ckpt prune``, …
        epoch: the writer's epoch of a trainer, or None.
        host: its machine.
        began: when the segment was begun: ISO 8601, UTC.
        written: when this state of it was written.
        closed: whether it will not be written again.
        dropped: older records that had to go because the store was away for long.
        open: saves under way at that moment.
        saves: what became of the others, oldest first.
        removals: what was deleted, oldest first.
    """

    source: str
    epoch: int | None
    host: str
    began: str
    written: str
    closed: bool = False
    dropped: int = 0
    open: tuple[OpenSave, ...] = ()
    saves: tuple[SaveRecord, ...] = ()
    removals: tuple[Removal, ...] = ()

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {
            "source": self.source,
            "epoch": self.epoch,
            "host": self.host,
            "began": self.began,
            "written": self.written,
            "closed": self.closed,
            "dropped": self.dropped,
            "open": [
                {"step": one.step, "kind": one.kind, "attempt": one.attempt, "since": one.since}
                for one in self.open
            ],
            "saves": [_save_json(record) for record in self.saves],
            "removals": [
                {"at": one.at, "names": list(one.names), "count": one.count}
                for one in self.removals
            ],
        }
        return seal(SEGMENT_FORMAT, SCHEMA, body)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Segment:
        """Read a segment.

        Args:
            data: arbitrary bytes.
            where: the file's path, for the message.

        Raises:
            DamagedError: it is not one, or it breaks a bound.
        """
        if len(data) > MAX_BYTES:
            raise DamagedError(f"{where} has {len(data)} bytes; a segment has at most {MAX_BYTES}")
        fields = Fields(unseal(data, SEGMENT_FORMAT, SCHEMA, where), where)
        segment = cls(
            source=fields.text("source", 64),
            epoch=fields.optional("epoch", lambda name: fields.integer(name, 1, 9_999)),
            host=fields.text("host", 300),
            began=fields.timestamp("began"),
            written=fields.timestamp("written"),
            closed=_boolean(fields, "closed"),
            dropped=fields.integer("dropped"),
            open=tuple(_parse_open(one) for one in _objects(fields, "open", MAX_OPEN)),
            saves=tuple(_parse_save(one) for one in _objects(fields, "saves", MAX_RECORDS)),
            removals=tuple(
                _parse_removal(one) for one in _objects(fields, "removals", MAX_RECORDS)
            ),
        )
        fields.done()
        return segment


def _save_json(record: SaveRecord) -> dict[str, Any]:
    return {
        "at": record.at,
        "step": record.step,
        "kind": record.kind,
        "attempt": record.attempt,
        "outcome": record.outcome,
        "version": record.version,
        "problem": record.problem,
        "world": record.world,
        "numbers": {name: float(value) for name, value in record.numbers.items()},
        "slowest": dict(record.slowest),
        "extra": {name: float(value) for name, value in record.extra.items()},
        "removed": list(record.removed),
        "removed_count": record.removed_count,
    }


def names_whole(name: str) -> bool:
    """Whether a bare name is that of a step or version, not of what is left of one."""
    return parse_step_dir(name) is not None or parse_version_name(name) is not None


def one_line(text: str) -> str:
    """A message in one line of at most :data:`MAX_PROBLEM` characters."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_PROBLEM else f"{line[: MAX_PROBLEM - 1]}…"


def finite_extra(values: Mapping[str, float]) -> dict[str, float]:
    """Those of a caller's numbers that a record can hold."""
    known = {
        str(name)[:_EXTRA_NAME]: float(value)
        for name, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value) and str(name)
    }
    return dict(list(known.items())[:MAX_EXTRA])


def _parse_open(fields: Fields) -> OpenSave:
    one = OpenSave(
        step=_step(fields),
        kind=_choice(fields, "kind", _KINDS),
        attempt=_attempt(fields),
        since=fields.timestamp("since"),
    )
    fields.done()
    return one


def _parse_save(fields: Fields) -> SaveRecord:
    version = fields.optional("version", lambda name: fields.text(name, 100))
    if version is not None and parse_version_name(version) is None:
        fields.refuse("version", "must be a version's name", version)
    record = SaveRecord(
        at=fields.timestamp("at"),
        step=_step(fields),
        kind=_choice(fields, "kind", _KINDS),
        attempt=_attempt(fields),
        outcome=_choice(fields, "outcome", _OUTCOMES),
        version=version,
        problem=fields.optional("problem", lambda name: fields.text(name, MAX_PROBLEM)),
        world=fields.integer("world", 1, 100_000),
        numbers=_numbers(fields, "numbers", NUMBERS),
        slowest=_ranks(fields),
        extra=_numbers(fields, "extra", None),
        removed=_names(fields, "removed"),
        removed_count=fields.integer("removed_count"),
    )
    fields.done()
    return record


def _parse_removal(fields: Fields) -> Removal:
    one = Removal(fields.timestamp("at"), _names(fields, "names"), fields.integer("count"))
    fields.done()
    return one


def _objects(fields: Fields, name: str, limit: int) -> list[Fields]:
    found = fields.objects(name)
    if len(found) > limit:
        fields.refuse(name, f"must have at most {limit} entries", len(found))
    return found


def _boolean(fields: Fields, name: str) -> bool:
    value = fields.raw(name)
    if not isinstance(value, bool):
        fields.refuse(name, "must be true or false", value)
    return value


def _step(fields: Fields) -> int | None:
    return fields.optional("step", lambda name: fields.integer(name, 0, 99_999_999))


def _choice(fields: Fields, name: str, choices: tuple[str, ...]) -> Any:
    value = fields.text(name, 64)
    if value not in choices:
        fields.refuse(name, f"must be one of {', '.join(choices)}", value)
    return value


def _attempt(fields: Fields) -> str:
    value = fields.text("attempt", 64)
    try:
        return check_attempt(value)
    except ValueError:
        fields.refuse("attempt", "must be an attempt id", value)


def _numbers(fields: Fields, name: str, known: tuple[str, ...] | None) -> dict[str, float]:
    """An object of finite numbers, perhaps empty."""
    if not fields.json(name):
        return {}
    numbers = fields.numbers(name, _EXTRA_NAME)
    if known is not None:
        for key, value in numbers.items():
            if key not in known or not 0 <= value <= MAX_NUMBER:
                rule = f"must be a known number from 0 to {MAX_NUMBER:g}"
                fields.refuse(f"{name}.{key}", rule, value)
    elif len(numbers) > MAX_EXTRA:
        fields.refuse(name, f"must have at most {MAX_EXTRA} entries", len(numbers))
    return numbers


def _ranks(fields: Fields) -> dict[str, int]:
    ranks = fields.json("slowest")
    for key, value in ranks.items():
        if key not in NUMBERS or type(value) is not int or not 0 <= value < 100_000:
            fields.refuse("slowest", "must give a rank for known numbers", {key: value})
    return ranks


def _names(fields: Fields, name: str) -> tuple[str, ...]:
    """Bare names of steps and versions."""
    value = fields.raw(name)
    if not isinstance(value, list) or len(value) > MAX_NAMES:
        fields.refuse(name, f"must be a list of at most {MAX_NAMES} names", value)
    for item in value:
        if not isinstance(item, str) or len(item) > 120 or not names_whole(item):
            fields.refuse(name, "must name steps and versions", item)
    return tuple(value)
