"""Sizes as people write them: ``500MB``, ``20GiB``, ``1048576``."""

from __future__ import annotations

import re
from typing import Final

from ckpt.errors import ConfigError

_SIZE: Final = re.compile(r"(?P<count>[0-9]{1,15})(?P<unit>[KMGT]i?B?|B)?")
_POWERS: Final = {"K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(what: str, text: str) -> int:
    """The bytes that a size stands for; ``K``, ``M``, ``G`` and ``T`` are decimal without an i.

    Raises:
        ConfigError: it is none, or zero; names ``what``.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or int(match["count"]) == 0:
        msg = f"{what} must be a size such as 500MB or 20GiB, got {text!r}"
        raise ConfigError(msg)
    unit = match["unit"] or "B"
    factor = 1024 if "i" in unit else 1000
    bytes_ = int(match["count"])
    for _ in range(_POWERS.get(unit[0], 0)):
        bytes_ *= factor
    return bytes_
