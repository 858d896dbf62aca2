"""Strict decoding of one TOML table into one frozen dataclass."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from archon_lora.errors import ParallelConfigError, TrainConfigError

S = TypeVar("S")


def decode_section(kind: type[S], data: object, where: str) -> S:
    """Build ``kind`` from a TOML table.

    Args:
        kind: a dataclass whose fields are bool, int, float, str, tuples of those, literals,
            mappings, or unions.
        data: the table.
        where: the section's name, for messages.

    Raises:
        TrainConfigError: not a table, an unknown or missing key, or a value of another type.
    """
    if not isinstance(data, dict):
        msg = f"[{where}] must be a table, got {data!r}"
        raise TrainConfigError(msg)
    fields = {f.name: f for f in dataclasses.fields(typing.cast("Any", kind))}
    for key in data:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(fields)}"
            msg = f"unknown key {where}.{key}; {hint}"
            raise TrainConfigError(msg)
    required = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    for name in required:
        if name not in data:
            msg = f"{where}.{name} is required; set it in [{where}] or with --set {where}.{name}=…"
            raise TrainConfigError(msg)
    hints = typing.get_type_hints(kind)
    values = {key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return kind(**values)
    except ParallelConfigError as err:
        msg = f"{where}.{err}"  # its messages begin with the name of the setting
        raise TrainConfigError(msg) from err


def _decode(hint: Any, value: object, where: str) -> Any:
    """One value as the type that ``hint`` names; bool is no int, an int serves as a float."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        for option in typing.get_args(hint):
            try:
                return _decode(option, value, where)
            except TrainConfigError:
                continue
    elif origin is typing.Literal:
        if value in typing.get_args(hint):
            return value
    elif origin is Mapping:
        if isinstance(value, dict):
            return value
    elif origin is tuple:
        if isinstance(value, list):
            item = typing.get_args(hint)[0]
            return tuple(_decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    elif hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    msg = f"{where} must be {_describe(hint)}, got {value!r}"
    raise TrainConfigError(msg)


def _describe(hint: Any) -> str:
    """A type in the words of a TOML author."""
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    if typing.get_origin(hint) is tuple:
        return f"a list (each item {_describe(typing.get_args(hint)[0])})"
    if typing.get_origin(hint) is Mapping:
        return "a table"
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return names.get(hint, str(hint))
