"""The part of ``ckpt prune`` that clears away uploads nobody will finish."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any, Final

from .errors import ConfigError
from .storage import Storage

DEFAULT_AGE: Final = "24h"
_AGE: Final = re.compile(r"(?P<count>\d{1,6})(?P<unit>[smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def age(text: str) -> timedelta:
    """The time span that a number and a unit name: ``90s``, ``30m``, ``24h``, ``7d``.

    Raises:
        ConfigError: anything else.
    """
    match = _AGE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--older-than must be like 90s, 30m, 24h or 7d, got {text!r}")
    return timedelta(**{_UNITS[match["unit"]]: int(match["count"])})


def upload_rows(storage: Storage, older_than: timedelta, *, dry_run: bool) -> list[dict[str, Any]]:
    """Abort what is old enough; one row for every unfinished upload, as ``prune`` prints them."""
    # s3fs is slow to import, and other prunings need none of it.
    from .storage.s3_reap import PendingUpload, reap_uploads

    def row(upload: PendingUpload, *, keep: bool) -> dict[str, Any]:
        limit = "younger" if keep else "older"
        return {
            "path": upload.path,
            "state": "unfinished",
            "bytes": None,
            "keep": keep,
            "reason": f"upload began {_span(upload.age)} ago, {limit} than {_span(older_than)}",
        }

    gone, stay = reap_uploads(storage, older_than, dry_run=dry_run)
    rows = [*(row(upload, keep=False) for upload in gone), *(row(up, keep=True) for up in stay)]
    return sorted(rows, key=lambda item: str(item["path"]))


def _span(span: timedelta) -> str:
    """A time span in the largest unit that it holds twice."""
    seconds = max(0, int(span.total_seconds()))
    for name, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{name}"
    return f"{seconds}s"
