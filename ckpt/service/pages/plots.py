"""What saves cost, as plots: bars of equal width, newest at the right, drawn as SVG by a template.

A plot's picture is stretched to the room that it gets, so it holds no text: numbers stand beside
it. A bar that is far above the others is cut off and marked, or it would flatten them all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ckpt.timeline import SaveRecord

from .text import rate, short, span

HEIGHT: Final = 100.0
STEP: Final = 10.0
_GAP: Final = 2.0
_FEWEST: Final = 24
"""Bars are never wider than if there were this many."""
_CUT: Final = 3.0
_SMALLEST: Final = 0.8

Part = tuple[str, Callable[[SaveRecord], float | None]]
"""A part of a bar: its class, and its value."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a bar; its class is the name of its part."""

    kind: str
    y: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """One save.

    Attributes:
        x: left edge.
        pieces: from the bottom up.
        label: what it says, for people.
        cut: whether it is higher than the plot.
    """

    x: float
    pieces: tuple[Piece, ...]
    label: str
    cut: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot.

    Attributes:
        key: names it in the page.
        title: what is shown.
        summary: the most important numbers of it.
        ticks: labels of the lines, from the top down to zero.
        bars: oldest first.
        legend: (class, word) of the parts.
        width: of the picture, in its own units.
        first: what the leftmost bar is.
        last: what the rightmost bar is.
    """

    key: str
    title: str
    summary: str
    ticks: tuple[str, ...]
    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, str], ...]
    width: float
    first: str
    last: str

    @property
    def bar_width(self) -> float:
        """Of each bar."""
        return STEP - _GAP


def _number(name: str) -> Callable[[SaveRecord], float | None]:
    return lambda record: record.numbers.get(name)


def _rest_of_stall(record: SaveRecord) -> float | None:
    numbers = record.numbers
    if "stall_ms" not in numbers:
        return None
    known = sum(numbers.get(name, 0.0) for name in ("wait_ms", "plan_ms", "copy_ms"))
    return max(0.0, numbers["stall_ms"] - known)


def _queued(record: SaveRecord) -> float | None:
    """Waiting for its turn, and what no other number counts."""
    numbers = record.numbers
    if "total_ms" not in numbers:
        return None
    known = ("stall_ms", "write_ms", "commit_ms", "publish_ms")
    return max(0.0, numbers["total_ms"] - sum(numbers.get(name, 0.0) for name in known))


def throughput(record: SaveRecord) -> float | None:
    """Bytes a second from the call to the end."""
    total, moved = record.numbers.get("total_ms"), record.numbers.get("stage_bytes")
    return None if not total or not moved else 1000 * moved / total


_STALL: Final[tuple[tuple[str, str, Callable[[SaveRecord], float | None]], ...]] = (
    ("wait", "waiting for a slot", _number("wait_ms")),
    ("plan", "planning", _number("plan_ms")),
    ("copy", "copying", _number("copy_ms")),
    ("other", "the rest", _rest_of_stall),
)
_TOTAL: Final[tuple[tuple[str, str, Callable[[SaveRecord], float | None]], ...]] = (
    ("other", "stall", _number("stall_ms")),
    ("wait", "queued", _queued),
    ("write", "writing", _number("write_ms")),
    ("commit", "commit", _number("commit_ms")),
    ("publish", "publishing", _number("publish_ms")),
)


def plots(records: Sequence[SaveRecord]) -> tuple[Plot, ...]:
    """The plots of saves and publishes, oldest first; one without a value is left out."""
    ran = [record for record in records if record.outcome != "skipped"]
    made = [
        _bars("stall", "Stall of the training step", ran, _STALL, span),
        _bars("total", "End to end", ran, _TOTAL, span),
        _bars("rate", "Throughput", ran, (("rate", "end to end", throughput),), rate),
        _bars(
            "lag",
            "From the call until engines see the version",
            [record for record in ran if "publish_lag_ms" in record.numbers],
            (("publish", "publish lag", _number("publish_lag_ms")),),
            span,
        ),
    ]
    return tuple(plot for plot in made if plot is not None)


def _bars(
    key: str,
    title: str,
    records: Sequence[SaveRecord],
    parts: Sequence[tuple[str, str, Callable[[SaveRecord], float | None]]],
    show: Callable[[float | None], str],
) -> Plot | None:
    rows = [[(kind, word, value(record)) for kind, word, value in parts] for record in records]
    sums = [sum(value for *_, value in row if value is not None) for row in rows]
    known = [total for total in sums if total > 0]
    if not known:
        return None
    top = _top(known)
    slots = max(len(rows), _FEWEST)
    bars = [
        _bar(STEP * (slots - len(rows) + place), row, total, top, _label(record, row, total, show))
        for place, (record, row, total) in enumerate(zip(records, rows, sums, strict=True))
    ]
    used = {kind for row in rows for kind, _word, value in row if value}
    return Plot(
        key=key,
        title=title,
        summary=f"median {show(statistics.median(known))}, highest {show(max(known))}",
        ticks=(short(show(top)), short(show(top / 2)), "0"),
        bars=tuple(bars),
        legend=tuple((kind, word) for kind, word, _value in parts if kind in used),
        width=STEP * slots,
        first=_what(records[0]),
        last=_what(records[-1]),
    )


def _bar(
    x: float, row: Sequence[tuple[str, str, float | None]], total: float, top: float, label: str
) -> Bar:
    pieces, at = [], 0.0
    for kind, _word, value in row:
        if not value:
            continue
        low, at = min(at, top), at + value
        height = HEIGHT * (min(at, top) - low) / top
        if height > 0:
            pieces.append(
                Piece(kind, round(HEIGHT * (1 - min(at, top) / top), 2), round(height, 2))
            )
    if pieces and sum(piece.height for piece in pieces) < _SMALLEST:
        pieces = [Piece(pieces[-1].kind, HEIGHT - _SMALLEST, _SMALLEST)]  # small, and not absent
    return Bar(round(x, 1), tuple(pieces), label, total > top)


def _label(
    record: SaveRecord,
    row: Sequence[tuple[str, str, float | None]],
    total: float,
    show: Callable[[float | None], str],
) -> str:
    label = f"{_what(record)}: {show(total)}"
    known = [f"{word} {show(value)}" for _kind, word, value in row if value]
    if len(known) > 1:
        label += f" ({', '.join(known)})"
    slow = record.slowest.get("stall_ms")
    if slow is not None and any(kind == "copy" for kind, *_ in row):
        label += f", slowest on rank {slow}"
    return label if record.outcome == "done" else f"{label}, {record.outcome}"


def _what(record: SaveRecord) -> str:
    if record.kind == "save":
        return f"step {record.step}"
    return record.version or ("publish" if record.step is None else f"publish at {record.step}")


def _top(values: Sequence[float]) -> float:
    """A round number above all values, or above nearly all where a few are far above the rest."""
    ordered = sorted(values)
    usual = ordered[int(0.9 * (len(ordered) - 1))]
    highest = ordered[-1]
    wanted = highest if highest <= _CUT * usual or len(ordered) < 4 else 1.5 * usual
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= wanted)
