"""A stand-in for AReaL's Saver: its asynchronous mode goes past the engine's ``save``."""

from __future__ import annotations

from typing import Any

from areal.api import SaveLoadMeta
from areal.experimental.engine.archon_checkpoint import save_model_to_hf
from areal.experimental.engine.archon_engine import ArchonEngine


class Saver:
    def __init__(self, mode: str) -> None:
        self.mode = mode

    def save(self, engine: Any, path: str) -> None:
        if self.mode in ("async", "auto") and isinstance(engine, ArchonEngine):
            save_model_to_hf(engine, path)
        else:
            engine.save(SaveLoadMeta(path, "hf", with_optim=False))
