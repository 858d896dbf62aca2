"""Fault points: named, counted, listed, and free when nothing is set."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ckpt
from ckpt.errors import ConfigError, StorageError
from ckpt.storage import faultpoints
from ckpt.storage.posix import PosixStorage


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(faultpoints.ENVIRONMENT, raising=False)
    faultpoints.forget()
    yield
    faultpoints.forget()


def arm(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setenv(faultpoints.ENVIRONMENT, spec)
    faultpoints.forget()


def test_every_point_is_passed_somewhere_and_every_pass_is_listed() -> None:
    source = "\n".join(path.read_text() for path in Path(ckpt.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'\bhit\("([^"]+)"\)', source)) == set(faultpoints.POINTS)


def test_nothing_happens_without_the_variable() -> None:
    for point in faultpoints.POINTS:
        faultpoints.hit(point)


def test_an_unlisted_point_is_an_error_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'no\.such' is not in the list"):
        faultpoints.hit("no.such")


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("posix.put.mid_write=kill", ("posix.put.mid_write", 1, "kill")),
        ("posix.put.mid_write:12=raise", ("posix.put.mid_write", 12, "raise")),
        (" posix.put.mid_write=hang ", ("posix.put.mid_write", 1, "hang")),
    ],
)
def test_the_variable_is_read(spec: str, parsed: tuple[str, int, str]) -> None:
    assert faultpoints.parse(spec) == parsed


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("posix.put.mid_write", "must be point"),
        ("posix.put.mid_write=explode", "must be point"),
        ("posix.put.mid_write:0=kill", "must be point"),
        ("posix.put.mid_write:x=kill", "must be point"),
        ("posix.put.no_such=kill", r"names no fault point: 'posix\.put\.no_such'; there are"),
    ],
)
def test_a_wrong_variable_is_an_error(monkeypatch, spec: str, message: str) -> None:
    arm(monkeypatch, spec)
    with pytest.raises(ConfigError, match=message):
        faultpoints.hit("posix.put.mid_write")


def test_raise_at_the_nth_pass_and_only_there(monkeypatch, tmp_path) -> None:
    arm(monkeypatch, "posix.put.before_rename:2=raise")
    store = PosixStorage(tmp_path)
    store.put("1", b"1")
    with pytest.raises(StorageError, match=r"2: write failed: injected fault at posix\.put\."):
        store.put("2", b"2")
    store.put("3", b"3")
    assert [entry.name for entry in store.list("")] == ["1", "3"]


def start(code: str, spec: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={faultpoints.ENVIRONMENT: spec, "PYTHONPATH": str(Path(ckpt.__file__).parent.parent)},
        stdout=subprocess.PIPE,
    )


CODE = (
    "from ckpt.storage.faultpoints import hit\n"
    "print('before', flush=True)\nhit('commit.before_manifest')\nprint('after', flush=True)"
)


def test_kill_is_sigkill() -> None:
    process = start(CODE, "commit.before_manifest=kill")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert out == b"before\n"


def test_hang_stays() -> None:
    process = start(CODE, "commit.before_manifest=hang")
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"before\n"
        time.sleep(0.3)
        assert process.poll() is None
    finally:
        process.kill()
        process.wait(timeout=30)
        rest = process.stdout.read()
        process.stdout.close()
    assert rest == b""
