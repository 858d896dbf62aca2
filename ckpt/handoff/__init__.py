"""Hand-over: published versions made live on inference engines, with proof."""

from __future__ import annotations

from .registry import Registry, Version

__all__ = ["Registry", "Version"]
