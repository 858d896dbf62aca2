"""What the timeline is told of a job: that it is under way, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .envelope import utc_now
from .handle import SaveHandle
from .job import Job
from .timeline import (
    MAX_NAMES,
    NUMBERS,
    OpenSave,
    Outcome,
    SaveRecord,
    finite_extra,
    one_line,
)
from .types import SaveMetrics

SLOWEST_OF: Final = ("stall_ms", "wait_ms", "plan_ms", "copy_ms", "write_ms")
"""Times of which a record gives the slowest rank's."""


def rank_cost(metrics: SaveMetrics) -> dict[str, float]:
    """What a rank tells rank 0 of its own part of a save, with its vote."""
    known = {name: getattr(metrics, name) for name in (*SLOWEST_OF, "stage_bytes")}
    return {name: round(float(value), 3) for name, value in known.items() if value is not None}


def open_save(job: Job) -> OpenSave:
    """A job that has just been handed to the background."""
    kind = "save" if job.resumable else "publish"
    return OpenSave(job.step, kind, job.attempt, utc_now())  # type: ignore[arg-type]  # a literal


def save_record(
    job: Job, error: BaseException | None, world: int, removed: Sequence[str]
) -> SaveRecord:
    """What became of a job that has ended.

    Args:
        job: the job; its handle is settled.
        error: what failed, or None.
        world: ranks that saved together.
        removed: bare names of what retention deleted after it.
    """
    handle = job.handle
    numbers, slowest = _numbers(handle.metrics, job.costs)
    version = _published(handle)
    done = handle.committed if job.resumable else handle.published
    fine = done.done() and done.exception() is None
    outcome: Outcome = "skipped" if handle.skipped else "done" if fine else "failed"
    return SaveRecord(
        at=utc_now(),
        step=job.step,
        kind="save" if job.resumable else "publish",
        attempt=job.attempt,
        outcome=outcome,
        version=version,
        problem=None if error is None else one_line(f"{type(error).__name__}: {error}"),
        world=world,
        numbers=numbers,
        slowest=slowest,
        extra=finite_extra(handle.metrics.extra),
        removed=tuple(removed[:MAX_NAMES]),
        removed_count=len(removed),
    )


def skipped_record(
    metrics: SaveMetrics, attempt: str, world: int, *, resumable: bool
) -> SaveRecord:
    """A save that ``when_busy`` left out before anything of it was made."""
    return SaveRecord(
        at=utc_now(),
        step=metrics.step,
        kind="save" if resumable else "publish",
        attempt=attempt,
        outcome="skipped",
        world=world,
        numbers={"queue_depth": float(metrics.queue_depth)},
    )


def _numbers(
    metrics: SaveMetrics, costs: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], dict[str, int]]:
    """A save's numbers over all ranks, and which rank each of the slowest times is of."""
    own = {name: getattr(metrics, name) for name in NUMBERS}
    numbers = {name: float(value) for name, value in own.items() if value is not None}
    slowest: dict[str, int] = {}
    if len(costs) > 1:
        for name in SLOWEST_OF:
            known = [(cost[name], rank) for rank, cost in enumerate(costs) if name in cost]
            if known:
                numbers[name], slowest[name] = max(known)
        numbers["stage_bytes"] = sum(cost.get("stage_bytes", 0.0) for cost in costs)
    return numbers, slowest


def _published(handle: SaveHandle) -> str | None:
    future = handle.published
    if handle.skipped or not future.done() or future.exception() is not None:
        return None
    manifest = future.result()
    return None if manifest is None else manifest.name
