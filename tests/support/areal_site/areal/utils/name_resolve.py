"""A stand-in for AReaL's registry, in this process alone."""

from __future__ import annotations

import time

_VALUES: dict[str, str] = {}


def add(
    name: str,
    value: str,
    delete_on_exit: bool = True,
    keepalive_ttl: float | None = None,
    replace: bool = False,
) -> None:
    if name in _VALUES and not replace:
        raise RuntimeError(f"{name} exists")
    _VALUES[name] = value


def wait(name: str, timeout: float) -> str:
    deadline = time.monotonic() + timeout
    while name not in _VALUES:
        if time.monotonic() > deadline:
            raise TimeoutError(name)
        time.sleep(0.005)
    return _VALUES[name]
