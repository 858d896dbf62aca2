"""Hand-over: published versions made live on inference engines, with proof.

Names are imported when they are first used: reading versions needs no HTTP client, which comes with
the extra ``[handoff]``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .registry import Registry, Version

if TYPE_CHECKING:
    from .drivers import open_engine
    from .engine import AdapterRefused, Engine, EngineError, EngineUnreachable, ProofError
    from .handover import Handover
    from .probe import Probe
    from .report import HandoverFailed, HandoverReport

_HOMES = {
    "AdapterRefused": "engine",
    "Engine": "engine",
    "EngineError": "engine",
    "EngineUnreachable": "engine",
    "Handover": "handover",
    "HandoverFailed": "report",
    "HandoverReport": "report",
    "Probe": "probe",
    "ProofError": "engine",
    "open_engine": "drivers",
}

__all__ = [
    "AdapterRefused",
    "Engine",
    "EngineError",
    "EngineUnreachable",
    "Handover",
    "HandoverFailed",
    "HandoverReport",
    "Probe",
    "ProofError",
    "Registry",
    "Version",
    "open_engine",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(importlib.import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
