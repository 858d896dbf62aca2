"""Nested state dicts from flat names, by the paths that DCP's planner keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckpt.errors import DamagedError

Path = tuple[str | int, ...]


def nest(values: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The nested dictionary; integer steps of a path are places in a list.

    Args:
        values: by flat name.
        paths: path of each name; a name without one stays at the top as it is.

    Raises:
        DamagedError: two paths contradict each other.
    """
    top: dict[str | int, Any] = {}
    for name, value in values.items():
        path = paths.get(name, (name,))
        inner = top
        for step in path[:-1]:
            inner = inner.setdefault(step, _Node())
            if not isinstance(inner, _Node):
                msg = f"{name!r} lies below a value, at {list(path)}"
                raise DamagedError(msg)
        if path[-1] in inner:
            msg = f"two entries lie at {list(path)}"
            raise DamagedError(msg)
        inner[path[-1]] = value
    return {str(step): _settled(value) for step, value in top.items()}


class _Node(dict[str | int, Any]):
    """A level that is being built; a value that is a dictionary is not one."""


def _settled(value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    keys: Sequence[str | int] = list(value)
    numbers = [key for key in keys if isinstance(key, int)]
    if len(numbers) == len(keys):
        if sorted(numbers) != list(range(len(numbers))):
            msg = f"a list has the places {sorted(numbers)[:10]}, some are missing"
            raise DamagedError(msg)
        return [_settled(value[number]) for number in sorted(numbers)]
    return {str(key): _settled(item) for key, item in value.items()}
