"""From rounds to medians: JSON for machines, a table for people."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from .savers import Memcpy, RawWrite
from .stall import Rounds


@dataclass(frozen=True)
class Case:
    """The rounds of one number of ranks."""

    world: int
    bytes_per_rank: int
    rounds: Rounds

    def summary(self) -> list[dict[str, Any]]:
        """One row a saver: medians in milliseconds, and ratios to the floors."""
        rows = []
        # A ratio is taken within each round: what disturbs a round disturbs all its savers.
        copies = [stall for stall, _ in self.rounds[Memcpy.name]]
        writes = [total for _, total in self.rounds[RawWrite.name]]
        for name, times in self.rounds.items():
            stalls, totals = [s for s, _ in times], [t for _, t in times]
            rows.append(
                {
                    "saver": name,
                    "stall_ms": round(median(stalls), 2),
                    "stall_ms_min": round(min(stalls), 2),
                    "stall_ms_max": round(max(stalls), 2),
                    "stall_over_memcpy": _ratio(stalls, copies),
                    "total_ms": round(median(totals), 2),
                    "total_over_raw_write": _ratio(totals, writes),
                }
            )
        return rows


def _ratio(times: list[float], floor: list[float]) -> float:
    """Median of the ratios within rounds."""
    return round(median(t / f for t, f in zip(times, floor, strict=True)), 2)


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def as_json(workload: str, repeats: int, cases: list[Case]) -> dict[str, Any]:
    """Everything, the single rounds included."""
    return {
        "workload": workload,
        "repeats": repeats,
        "environment": environment(),
        "cases": [
            {
                "ranks": case.world,
                "bytes_per_rank": case.bytes_per_rank,
                "summary": case.summary(),
                "rounds_ms": case.rounds,
            }
            for case in cases
        ],
    }


def as_markdown(workload: str, repeats: int, cases: list[Case]) -> str:
    """One table for each number of ranks."""
    env = environment()
    lines = [
        "# Results",
        "",
        f"`python -m benchmarks --workload {workload} --repeats {repeats}` on {env['cpus']} CPUs "
        f"({env['machine']}), Python {env['python']}, torch {env['torch']}. Medians of interleaved "
        "rounds; of several ranks the slowest counts.",
    ]
    for case in cases:
        ranks = "1 rank" if case.world == 1 else f"{case.world} ranks (FSDP2)"
        lines += [
            "",
            f"## {ranks}, {case.bytes_per_rank / 1e6:.1f} MB each",
            "",
            "| | stall ms | / memcpy | durable after ms | / raw write |",
            "|---|---:|---:|---:|---:|",
        ]
        memory_only = Memcpy.name
        for row in case.summary():
            durable = (
                " | "
                if row["saver"] == memory_only
                else f"{row['total_ms']:.1f} | {row['total_over_raw_write']:.2f}"
            )
            lines.append(
                f"| {row['saver']} | {row['stall_ms']:.1f} | {row['stall_over_memcpy']:.2f} "
                f"| {durable} |"
            )
    return "\n".join(lines) + "\n"
