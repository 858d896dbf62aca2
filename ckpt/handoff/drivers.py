"""Which driver an engine's address asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ckpt.errors import ConfigError

from .generate import Generator
from .replica import DEFAULT_TIMEOUT_S
from .sglang import SglangEngine
from .vllm import VllmEngine

_DRIVERS: Final[dict[str, Callable[..., Generator]]] = {"vllm": VllmEngine, "sglang": SglangEngine}


def open_engine(
    address: str,
    *,
    api_key: str | None = None,
    base_model: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Generator:
    """The driver for an address such as ``vllm+http://127.0.0.1:8000``; nothing is sent yet.

    Args:
        address: ``vllm+`` or ``sglang+``, and the replica's ``http://`` or ``https://`` address.
        api_key: what the replica was started with, if it was.
        base_model: the name under which it serves the base, if it serves several.
        timeout_s: how long one answer may take.

    Raises:
        ConfigError: another kind of address, or a time that is none.
    """
    kind, plus, url = address.partition("+")
    if not plus or kind not in _DRIVERS:
        known = " or ".join(f"{name}+http://host:port" for name in _DRIVERS)
        # An address may hold a password; only what stands in front of it is shown.
        msg = f"an engine's address is {known}, got one that starts with {address.split(':')[0]!r}"
        raise ConfigError(msg)
    return _DRIVERS[kind](url, api_key=api_key, base_model=base_model, timeout_s=timeout_s)
