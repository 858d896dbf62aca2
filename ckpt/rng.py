"""Random number generators of one rank: capture, put back, derive for another topology."""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch

from .state import encode_state


def capture_rng() -> dict[str, Any]:
    """The state of Python's, NumPy's (if imported), torch's and every CUDA device's generator."""
    numpy = sys.modules.get("numpy")
    return {
        "python": random.getstate(),
        "numpy": None if numpy is None else numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def apply_rng(saved: dict[str, Any]) -> list[str]:
    """Put a captured state back.

    Returns:
        What could not carry over exactly (other CUDA devices), for the log.
    """
    random.setstate(saved["python"])
    torch.set_rng_state(saved["torch"])
    notes = []
    if saved["numpy"] is not None:
        import numpy as np

        np.random.set_state(saved["numpy"])
    states = saved["cuda"]
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in range(min(devices, len(states))):
        torch.cuda.set_rng_state(states[device], device)
    for device in range(len(states), devices):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(_seed(saved, f"cuda:{device}"))
    if devices != len(states):
        notes.append(f"CUDA generators: {len(states)} were saved, {devices} devices are here")
    return notes


def derive_rng(saved: dict[str, Any], rank: int, world: int) -> None:
    """Seed every generator from another topology's rank 0, this rank and this world size.

    The same checkpoint restored twice on the same number of ranks gives the same streams, and
    no two ranks share one.
    """
    label = f"{rank}/{world}"
    random.seed(_seed(saved, f"{label}/python"))
    torch.default_generator.manual_seed(_seed(saved, f"{label}/torch"))
    if saved["numpy"] is not None or "numpy" in sys.modules:
        import numpy as np

        np.random.seed(_seed(saved, f"{label}/numpy") % 2**32)
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            with torch.cuda.device(device):
                torch.cuda.manual_seed(_seed(saved, f"{label}/cuda:{device}"))


def _seed(saved: dict[str, Any], label: str) -> int:
    digest = hashlib.sha256(encode_state(saved) + label.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
