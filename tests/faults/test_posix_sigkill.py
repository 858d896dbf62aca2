"""SIGKILL at every point of a POSIX write: afterwards a name shows all of the old or of the new.

Each case is a real process that dies by a real signal.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from ckpt.layout import TMP_PREFIX
from ckpt.storage import Entry, faultpoints, open_storage
from ckpt.storage.faultpoints import ENVIRONMENT, POSIX_POINTS

# From Python 3.12 on a fork of a process with threads warns; the child uses none of them.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*may lead to deadlocks:DeprecationWarning")

OLD, NEW = b"old content", b"the new content " * 4096

# Which call passes which points; a point that no call passes would fail the test below.
CALLS = {
    "put": ["posix.put.before_rename", "posix.put.after_rename"],
    "put_stream": ["posix.put.before_rename", "posix.put.after_rename"],
    "put_new": ["posix.put_new.before_link", "posix.put_new.after_link"],
    "rename_dir": ["posix.rename_dir.before", "posix.rename_dir.after"],
}
WRITE_POINTS = [
    "posix.put.before_write",
    "posix.put.mid_write",
    "posix.put.after_write",
    "posix.put.after_fsync",
]
CASES = [
    (call, point)
    for call, points in CALLS.items()
    for point in (points if call == "rename_dir" else [*WRITE_POINTS, *points])
]


def write(root: str, call: str, point: str) -> None:
    """The process that dies. Forked, so that hundreds of cases do not import torch each."""
    os.environ[ENVIRONMENT] = f"{point}=kill"
    faultpoints.forget()
    store = open_storage(root)
    if call == "put":
        store.put("d/name", [NEW[:5], NEW[5:]])
    elif call == "put_stream":
        store.put_stream("d/name", [NEW[:5], NEW[5:]], len(NEW))
    elif call == "put_new":
        store.put_new("d/fresh", NEW)
    else:
        store.rename_dir("d/tmp", "d/step")


def test_no_point_is_forgotten() -> None:
    assert {point for _call, point in CASES} == set(POSIX_POINTS)


@pytest.mark.parametrize(("call", "point"), CASES)
def test_a_killed_writer_leaves_old_or_new(tmp_path: Path, call: str, point: str) -> None:
    store = open_storage(tmp_path)
    store.put("d/name", OLD)
    store.put("d/tmp/inner", NEW)
    writer = multiprocessing.get_context("fork").Process(
        target=write, args=(str(tmp_path), call, point)
    )
    writer.start()
    writer.join(timeout=60)
    assert writer.exitcode == -signal.SIGKILL

    renamed = point.endswith(("after_rename", "after_link", "rename_dir.after"))
    visible = [entry for entry in store.list("d") if not entry.name.startswith(TMP_PREFIX)]
    wanted = [Entry("name", False, len(OLD)), Entry("tmp", True, 0)]
    if call in {"put", "put_stream"}:
        assert store.read("d/name") == (NEW if renamed else OLD)
        wanted[0] = Entry("name", False, len(NEW if renamed else OLD))
    elif call == "put_new" and renamed:
        assert store.read("d/fresh") == NEW
        wanted.insert(0, Entry("fresh", False, len(NEW)))
    elif call == "rename_dir" and renamed:
        wanted[1] = Entry("step", True, 0)
        assert store.read("d/step/inner") == NEW
    assert visible == wanted

    # The next writer is not in the way of what the dead one left.
    store.put("d/name", b"next")
    assert store.read("d/name") == b"next"
    if call == "put_new" and not renamed:
        store.put_new("d/fresh", b"next")
