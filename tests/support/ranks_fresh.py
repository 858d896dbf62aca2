"""What a rank finds when it begins."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy


def surroundings(rank: int, world: int, variable: str) -> dict[str, object]:
    """Whatever could differ from a process that was started by itself."""
    return {
        "hash": hash("the order of a set hangs on this"),
        "variable": os.environ.get(variable),
        "folder": str(Path.cwd()),
        "threads": threading.active_count(),
        "random": random.random(),
        "numpy": float(numpy.random.random()),
        "pid": os.getpid(),
    }
