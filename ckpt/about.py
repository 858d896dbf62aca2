"""Which version of the package is running."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Final

DISTRIBUTION: Final = "archon-lora"


@cache
def package_version() -> str:
    """The installed version, as manifests record it; ``"unknown"`` in a bare source tree."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "unknown"
