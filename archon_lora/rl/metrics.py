"""Metrics as JSON lines, and how a person sees them while the run goes on.

Each line is one optimizer step. Floats are written by ``repr``, so reading a line back gives
the very same bits: two runs can be compared exactly. A run that was killed may have logged a
step that it never committed; its successor logs that step again, and the last line wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class MetricsWriter:
    """Appends one JSON object a line and flushes it, so that a SIGKILL costs at most a line.

    Args:
        path: the file.
        also: takes every record once it is written.
    """

    def __init__(
        self, path: Path, also: Callable[[Mapping[str, Any]], object] | None = None
    ) -> None:
        self._also = also
        path.parent.mkdir(parents=True, exist_ok=True)
        _end_torn_line(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Write one record.

        Raises:
            ValueError: a value is NaN or infinite; a run must not go on from there unnoticed.
        """
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                msg = f"metric {key} is {value} at step {record.get('step')}"
                raise ValueError(msg)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._also is not None:
            self._also(record)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end_torn_line(path: Path) -> None:
    """End a line that a killed predecessor left unfinished, lest the next one be glued to it."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """Step to record of a metrics file, the last line of a step winning."""
    steps = {r["step"]: r for r in read_records(path) if isinstance(r.get("step"), int)}
    return dict(sorted(steps.items()))


def read_events(path: Path, event: str) -> list[dict[str, Any]]:
    """Every record of one kind of event (``start``, ``end``), in order."""
    return [record for record in read_records(path) if record.get("event") == event]


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a metrics file; lines that a kill tore hold nothing and are left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


class ProgressDisplay:
    """A progress bar on a terminal, one plain line a step elsewhere; silent off rank 0."""

    def __init__(self, *, total: int, start: int, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if enabled and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, note="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One line of news."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a finished step."""
        note = (
            f"reward {record['reward']:.3f}  loss {record['loss']:+.4f}  kl {record['kl']:.3f}  "
            f"stall {record['stall_ms']:.1f} ms"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=record["step"] + 1, note=note)
        else:
            self.say(f"step {record['step'] + 1}/{self._total}  {note}")
