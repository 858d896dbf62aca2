"""A file system that is full, or out of inodes, in the middle of a save."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fault_cells import NEWEST, Field, Ground, run_trainer

pytestmark = pytest.mark.dist

ROOM = 2 * 2**20
"""Bytes of the small file system: enough for some ten steps."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM},nr_inodes=200", "tmpfs", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def ground_on(field: Field, disk: Path) -> Ground:
    """A planted root on the small file system."""
    ground = field.ground("posix")
    moved = Ground("posix", str(disk / "root"), None, ground.known, ground.tally)
    moved.plant(field.plant("posix"))
    return moved


def left(disk: Path) -> int:
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


@pytest.mark.cells(1)
@pytest.mark.parametrize("room", [0, 8192, 32768, 49152, 65536, 90112, 106496, 114688, 122880])
def test_the_disk_is_full(field: Field, disk: Path, room: int) -> None:
    """However much still fits: all ranks hear of it, and once there is room the run goes on."""
    ground = ground_on(field, disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(left(disk) - room))
    assert left(disk) == room
    for rank in run_trainer(ground.script()):
        kinds = {kind for _step, kind, _text in rank.errors}
        assert kinds <= {"SaveAborted", "StorageError", "PublishError"}, rank.errors
        assert any("No space left" in text for _step, _kind, text in rank.errors), rank.errors
        assert rank.committed in ([], [NEWEST + 1])
    committed = max(ground.committed())[0]
    ground.restore(committed)
    assert ground.verify() == []
    ballast.unlink()
    ground.go_on(committed)


@pytest.mark.cells(1)
@pytest.mark.parametrize("inodes", [0, 2, 4, 7])
def test_there_are_no_inodes_left(field: Field, disk: Path, inodes: int) -> None:
    ground = ground_on(field, disk)
    ballast = disk / "ballast"
    ballast.mkdir()
    for number in range(os.statvfs(disk).f_ffree - inodes):
        (ballast / str(number)).touch()
    for rank in run_trainer(ground.script()):
        assert any("No space left" in text for _step, _kind, text in rank.errors), rank.errors
    committed = max(ground.committed())[0]
    ground.restore(committed)
    for file in ballast.iterdir():
        file.unlink()
    ground.go_on(committed)
