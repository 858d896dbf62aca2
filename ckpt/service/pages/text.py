"""Numbers and moments as people read them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Final

_UNITS: Final = ("B", "KB", "MB", "GB", "TB", "PB")


def digits(value: float) -> str:
    """A number with three digits that count, and no exponent unless it is huge."""
    size = abs(value)
    if size >= 1e7:
        return f"{value:.3g}"
    if size >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 0.1 else f"{value:.2g}"


def size(value: float | None) -> str:
    """Bytes in units of 1000."""
    if value is None:
        return "\N{EN DASH}"
    for unit in _UNITS[:-1]:
        if abs(value) < 1000:
            return f"{value:.0f} B" if unit == "B" else f"{digits(value)} {unit}"
        value /= 1000
    return f"{digits(value)} {_UNITS[-1]}"


def span(ms: float | None) -> str:
    """A time, given in milliseconds."""
    if ms is None:
        return "\N{EN DASH}"
    if ms < 1000:
        return f"{digits(ms)} ms"
    seconds = ms / 1000
    if seconds < 120:
        return f"{digits(seconds)} s"
    minutes = seconds / 60
    return f"{digits(minutes)} min" if minutes < 120 else f"{digits(minutes / 60)} h"


def short(label: str) -> str:
    """A label without zeros that say nothing: ``80.0 ms`` is ``80 ms``."""
    number, space, unit = label.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def rate(value: float | None) -> str:
    """Bytes a second."""
    return "\N{EN DASH}" if value is None else f"{size(value)}/s"


def ago(moment: str | None, now: datetime | None = None) -> str:
    """How long ago a moment was, given in ISO 8601."""
    if not moment:
        return "\N{EN DASH}"
    seconds = ((now or datetime.now(UTC)) - datetime.fromisoformat(moment)).total_seconds()
    if seconds < 0:
        return "just now" if seconds > -60 else "in the future"
    for bound, divisor, unit in (
        (60.0, 1.0, "s"),
        (3600.0, 60.0, "min"),
        (2 * 86400.0, 3600.0, "h"),
        (math.inf, 86400.0, "days"),
    ):
        if seconds < bound:
            return f"{int(seconds / divisor)} {unit} ago"
    raise AssertionError


def clock(moment: str | None) -> str:
    """A moment as date and time in UTC."""
    if not moment:
        return "\N{EN DASH}"
    return datetime.fromisoformat(moment).astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
