"""What the demonstration found: a table, a JSON file and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MARKS = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: "[dim]noted[/]"}


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, what was measured, and whether it holds (None: a measurement, not a claim)."""

    claim: str
    measured: str
    passed: bool | None


@dataclass(slots=True)
class Report:
    """Checks in the order they were made, and seconds per phase."""

    checks: list[Check] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def check(self, claim: str, measured: str, *, passed: bool) -> None:
        """Note one finding."""
        self.checks.append(Check(claim=claim, measured=measured, passed=passed))

    def note(self, what: str, measured: str) -> None:
        """Note a measurement that nothing is claimed about."""
        self.checks.append(Check(claim=what, measured=measured, passed=None))

    @property
    def passed(self) -> bool:
        """Whether there are checks and all of them hold."""
        verdicts = [check.passed for check in self.checks if check.passed is not None]
        return bool(verdicts) and all(verdicts)

    def document(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
            "seconds": self.seconds,
            "figures": self.figures,
        }

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        text = json.dumps(self.document(), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")

    def show(self, console: Console) -> None:
        """Print the table."""
        table = Table(title="archon-lora demo", title_justify="left")
        table.add_column("checked", overflow="fold")
        table.add_column("measured", overflow="fold")
        table.add_column("", justify="right")
        for check in self.checks:
            table.add_row(check.claim, check.measured, _MARKS[check.passed])
        console.print(table)
        total = sum(self.seconds.values())
        parts = ", ".join(f"{name} {spent:.1f}" for name, spent in self.seconds.items())
        console.print(f"{total:.1f} s ({parts})", markup=False, highlight=False)


def draw(
    path: Path,
    *,
    reference: Mapping[int, Mapping[str, Any]],
    joined: Mapping[int, Mapping[str, Any]],
    killed_after: int,
    resumed_at: int,
    moved_at: int,
) -> None:
    """Draw reward and stall over steps.

    Args:
        path: the PNG.
        reference: records of the uninterrupted run by step.
        joined: records of the killed, resumed and moved run by step.
        killed_after: last step logged before the kill.
        resumed_at: first step after the resume.
        moved_at: first step on one rank.
    """
    import matplotlib as mpl

    mpl.use("Agg")  # no display takes part
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    top.plot(
        list(reference),
        [r["reward"] for r in reference.values()],
        lw=4,
        alpha=0.35,
        label="uninterrupted, 2 ranks",
    )
    top.plot(
        list(joined),
        [r["reward"] for r in joined.values()],
        "k.-",
        lw=1,
        ms=4,
        label="killed and resumed, then 1 rank",
    )
    for axis in (top, bottom):
        axis.axvline(killed_after + 0.5, color="tab:red", ls="--", label="SIGKILL of rank 1")
        axis.axvline(resumed_at - 0.5, color="tab:green", ls=":", label="resumed")
        axis.axvline(moved_at - 0.5, color="tab:blue", ls="-.", label="resumed on 1 rank")
    top.set_ylabel("mean reward")
    top.legend(fontsize=8)
    bottom.bar(list(joined), [r["stall_ms"] for r in joined.values()], color="tab:gray")
    bottom.set_ylabel("stall per save (ms)")
    bottom.set_yscale("log")
    bottom.set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)
    plt.close(figure)
