"""How stall and end-to-end time grow with bytes, tensors and ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .processes import Settings, run_section
from .saves import core_saves
from .workload import Uniform

BYTES = (10_000_000, 100_000_000, 500_000_000, 2_000_000_000)
TENSORS = (104, 1_000, 5_000, 20_000)
RANKS = (1, 2, 4)
MIDDLE_BYTES = 100_000_000
MIDDLE_TENSORS = 1_000


def cases() -> Iterator[tuple[str, int, Uniform]]:
    """(what grows, ranks, workload); the state is shared out over the ranks."""
    for nbytes in BYTES:
        yield "bytes", 1, Uniform(nbytes, MIDDLE_TENSORS)
    for tensors in TENSORS:
        yield "tensors", 1, Uniform(MIDDLE_BYTES, tensors)
    for ranks in RANKS:
        yield "ranks", ranks, Uniform(MIDDLE_BYTES, MIDDLE_TENSORS)


def growth(settings: Settings, say: Callable[[str], object]) -> list[dict[str, Any]]:
    """Measure every case in fresh processes."""
    found = []
    for axis, ranks, workload in cases():
        say(f"growth with {axis}: {workload.nbytes / 1e6:.0f} MB, {workload.tensors}, {ranks}")
        result = run_section(core_saves, replace(settings, workload=workload), world=ranks)
        found.append({"axis": axis, **result})
    return found
