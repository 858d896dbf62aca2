"""Checks of single values of a ``config.json``; each error names the key."""

from __future__ import annotations

import math

from archon_lora.errors import ModelLoadError


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Refuse anything but an integer of at least ``least``.

    Raises:
        ModelLoadError: another type or a smaller value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        msg = f"config.json: {name} must be an integer >= {least}, got {value!r}"
        raise ModelLoadError(msg)


def check_positive(name: str, value: object) -> None:
    """Refuse anything but a finite number above 0.

    Raises:
        ModelLoadError: another type or value.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not value > 0 or not math.isfinite(value):  # type: ignore[operator,arg-type]  # a number
        msg = f"config.json: {name} must be a number > 0, got {value!r}"
        raise ModelLoadError(msg)


def check_flag(name: str, value: object) -> None:
    """Refuse anything but true or false.

    Raises:
        ModelLoadError: another type.
    """
    if not isinstance(value, bool):
        msg = f"config.json: {name} must be true or false, got {value!r}"
        raise ModelLoadError(msg)
