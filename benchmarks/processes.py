"""Fresh processes for every section, so that no saver inherits another section's memory."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from .workload import WORKLOADS, Workload


@dataclass(frozen=True)
class Settings:
    """What a section is run with.

    Attributes:
        workload: shapes of the state.
        repeats: rounds that are aimed at.
        seconds: after this many (and three rounds) a section begins no further round.
        folder: where it writes.
    """

    workload: Workload
    repeats: int
    seconds: float
    folder: Path

    @classmethod
    def of(cls, workload: str, repeats: int, seconds: float, folder: Path) -> Settings:
        """Settings for a named workload."""
        return cls(WORKLOADS[workload], repeats, seconds, folder)


Section = Callable[[Settings], Any]
"""Measures on every rank; what rank 0 returns (JSON-like) is the result."""


def run_section(section: Section, settings: Settings, *, world: int = 1) -> Any:
    """Run a section on ``world`` fresh processes, in a folder of its own that is then removed.

    Returns:
        What the section returned on rank 0.
    """
    with TemporaryDirectory(prefix="bench-", dir=settings.folder) as folder:
        own = replace(settings, folder=Path(folder))
        multiprocessing.spawn(_rank, (world, section, own), nprocs=world)
        return json.loads((own.folder / "result.json").read_text(encoding="utf-8"))


def _rank(rank: int, world: int, section: Section, settings: Settings) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    # Peers warn about their own use of torch; that is their users' affair.
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(settings.folder / "rendezvous"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    result = section(settings)
    if rank == 0:
        (settings.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()
