"""Named places where a test makes the process die, fail, hang or sleep.

The variable ``ARCHON_CKPT_FAULT`` names one point and what happens there::

    ARCHON_CKPT_FAULT="posix.put.before_rename=kill"      SIGKILL at the first pass
    ARCHON_CKPT_FAULT="posix.put.mid_write:3=raise"       an I/O error at the third pass
    ARCHON_CKPT_FAULT="commit.before_manifest=hang"       sleeps for ever
    ARCHON_CKPT_FAULT="commit.before_manifest=stop"       SIGSTOP: goes on after a SIGCONT

It is read at the first pass of any point. Without it a point costs one comparison. All points
are listed here, so that a test over :data:`POINTS` cannot forget one.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, field

from ckpt.errors import ConfigError

ENVIRONMENT = "ARCHON_CKPT_FAULT"

POSIX_POINTS = (
    "posix.put.before_write",
    "posix.put.mid_write",
    "posix.put.after_write",
    "posix.put.after_fsync",
    "posix.put.before_rename",
    "posix.put.after_rename",
    "posix.put_new.before_link",
    "posix.put_new.after_link",
    "posix.rename_dir.before",
    "posix.rename_dir.after",
)
OBJECT_POINTS = (
    "object.put.before",
    "object.put.after",
    "object.multipart.mid",
    "object.multipart.before_complete",
    "object.multipart.after_complete",
    "object.put_new.before",
    "object.put_new.after",
)
COMMIT_POINTS = (
    "commit.before_manifest",
    "commit.after_manifest",
)
UPLOAD_POINTS = (
    "upload.before_file",
    "upload.mid_file",
    "upload.after_file",
    "upload.before_commit",
    "upload.before_mark",
    "upload.idle",
)
JOB_POINTS = (
    "job.begun",
    "job.unit",
    "job.before_result",
)
POINTS = frozenset((*POSIX_POINTS, *OBJECT_POINTS, *COMMIT_POINTS, *UPLOAD_POINTS, *JOB_POINTS))
"""Every point there is."""

_SPEC = re.compile(r"(?P<point>[a-z0-9_.]+)(:(?P<nth>[1-9][0-9]{0,8}))?=(?P<action>[a-z]+)")
_ACTIONS = ("kill", "raise", "hang", "stop")


class InjectedFault(OSError):
    """The error that the action ``raise`` raises; stores wrap it like any I/O error."""


@dataclass(slots=True)
class _Fault:
    point: str
    nth: int
    action: str
    passes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


_state: dict[str, _Fault | None] = {}
"""Holds the parsed variable under the key ``fault`` once it has been read."""


def parse(spec: str) -> tuple[str, int, str]:
    """(point, nth pass, action) of a value of ``ARCHON_CKPT_FAULT``.

    Raises:
        ConfigError: a malformed value, an unknown point or an unknown action.
    """
    match = _SPEC.fullmatch(spec.strip())
    if match is None or match["action"] not in _ACTIONS:
        msg = f"{ENVIRONMENT} must be point[:nth]=kill|raise|hang|stop, got {spec!r}"
        raise ConfigError(msg)
    if match["point"] not in POINTS:
        msg = f"{ENVIRONMENT} names no fault point: {match['point']!r}; there are {sorted(POINTS)}"
        raise ConfigError(msg)
    return match["point"], int(match["nth"] or 1), match["action"]


def forget() -> None:
    """Read the environment again at the next pass."""
    _state.clear()


def hit(point: str) -> None:
    """Pass a point; what happens is the environment's choice.

    Raises:
        InjectedFault: the action is ``raise``.
        ConfigError: the variable is malformed, or ``point`` is not in :data:`POINTS`.
    """
    if "fault" not in _state:
        spec = os.environ.get(ENVIRONMENT)
        _state["fault"] = _Fault(*parse(spec)) if spec else None
    if point not in POINTS:
        msg = f"{point!r} is not in the list of fault points"
        raise ConfigError(msg)
    fault = _state.get("fault")
    if fault is None or fault.point != point:
        return
    with fault.lock:
        fault.passes += 1
        due = fault.passes == fault.nth
    if not due:
        return
    if fault.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.action == "stop":
        # To this thread: sent to the process, another thread could take the signal while this one
        # runs past the point.
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return
    if fault.action == "raise":
        raise InjectedFault(errno.EIO, f"injected fault at {point}")
    while True:
        time.sleep(60)
