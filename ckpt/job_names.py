"""Names of what jobs leave in a root: their records, and the adapters that they export.

The rules are those of :mod:`ckpt.layout`: made from checked parts, parsed strictly.
"""

from __future__ import annotations

import re
import time
import uuid
from typing import Final

from .errors import ConfigError
from .layout import TMP_PREFIX, parse_step_dir, step_name

JOBS: Final = "jobs"
"""Work that somebody asked a service for: what, who is at it, and what came of it."""
EXPORTS: Final = "exports"
"""Adapters of steps, as jobs wrote them: plain PEFT directories."""
MAX_TRY: Final = 9_999

_JOB: Final = re.compile(r"job-[0-9]{13}-[0-9a-f]{8}")
_TRY: Final = re.compile(r"try-([0-9]{4})\.json")
_DTYPES: Final = ("bfloat16", "float16", "float32")


def new_job_id() -> str:
    """``job-1764091234567-1f0c22ab``: ids sort by the time they were made (milliseconds, UTC)."""
    return f"job-{time.time_ns() // 1_000_000:013d}-{uuid.uuid4().hex[:8]}"


def job_dir(job: str) -> str:
    """``jobs/<id>``: the records of one job.

    Raises:
        ConfigError: that is no id.
    """
    if not isinstance(job, str) or not _JOB.fullmatch(job):
        msg = f"{job!r} is no job's id; they are like 'job-1764091234567-1f0c22ab'"
        raise ConfigError(msg)
    return f"{JOBS}/{job}"


def parse_job(name: str) -> str | None:
    """The id of an entry of ``jobs/``, or None for a foreign name."""
    return name if _JOB.fullmatch(name) else None


def try_path(job: str, number: int) -> str:
    """``jobs/<id>/try-0001.json``: who may work at a job, for the first time, the second, …."""
    if not 1 <= number <= MAX_TRY:
        msg = f"a job is tried 1 to {MAX_TRY} times, got {number}"
        raise ConfigError(msg)
    return f"{job_dir(job)}/try-{number:04d}.json"


def parse_try(name: str) -> int | None:
    """The number of a try, from its file's name, or None for a foreign one."""
    match = _TRY.fullmatch(name)
    return int(match[1]) if match and int(match[1]) >= 1 else None


def export_name(step: int, epoch: int, dtype: str) -> str:
    """``step-00000042.w0003-bfloat16``: one name for one content.

    Raises:
        ConfigError: a bad number or dtype.
    """
    name = f"{step_name(step, epoch)}-{dtype}"
    if parse_export(name) is None:
        msg = f"the dtype of an export is bfloat16, float16 or float32, got {dtype!r}"
        raise ConfigError(msg)
    return name


def parse_export(name: str) -> tuple[int, int, str] | None:
    """(step, epoch, dtype) of an entry of ``exports/``, or None for a foreign name."""
    directory, _, dtype = name.rpartition("-")
    pair = parse_step_dir(directory)
    return None if pair is None or dtype not in _DTYPES else (*pair, dtype)


def export_dir(name: str) -> str:
    """``exports/<name>``.

    Raises:
        ConfigError: that is no export's name.
    """
    if parse_export(name) is None:
        msg = f"{name!r} is no export's name; they are like 'step-00000042.w0003-bfloat16'"
        raise ConfigError(msg)
    return f"{EXPORTS}/{name}"


def tmp_export_dir(job: str, number: int) -> str:
    """``exports/.tmp-<job>-<try>``: an export that is being written (POSIX)."""
    return f"{EXPORTS}/{TMP_PREFIX}{job_dir(job).partition('/')[2]}-{number:04d}"
