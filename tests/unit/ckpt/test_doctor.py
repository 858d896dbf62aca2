"""``ckpt doctor``: what it finds on sound and on unsound roots, and that it leaves nothing."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.fake_s3 import FakeS3, Spoil, fake_s3
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.doctor import State, examine
from ckpt.errors import ConfigError
from ckpt.storage import open_storage
from ckpt.storage.posix import PosixStorage


def doctor(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *(str(argument) for argument in arguments)])


def by_name(storage: Any) -> dict[str, Any]:
    return {check.name: check for check in examine(storage, size=4096)}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDDOCTOR")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with fake_s3() as server:
        yield server


def on(server: FakeS3) -> Any:
    options = {"endpoint_url": server.url, "retry": {"attempts": 1}}
    return open_storage("s3://bucket/run7", options)


def test_a_sound_directory_passes_and_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    result = doctor(tmp_path, "--size", 1)
    assert result.exit_code == 0, result.output
    assert "everything that is promised holds here" in result.output
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_the_document_has_every_check(tmp_path: Path) -> None:
    found = json.loads(doctor(tmp_path, "--size", 1, "--json").stdout)
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == [
        "list", "write", "exclusive create", "rename", "clock", "latency", "throughput", "space",
    ]  # fmt: skip


def test_a_missing_directory_and_a_dead_server_are_storage_errors(tmp_path: Path) -> None:
    result = doctor(tmp_path / "none")
    assert result.exit_code == 3
    assert "no such directory" in result.stderr


def test_a_directory_that_cannot_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    """Permissions do not stop root, so the refusal is made."""

    def refuse(*_args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(PosixStorage, "_make_dirs", refuse)
    result = doctor(tmp_path)
    assert result.exit_code == 1
    assert "failed  write:" in result.stdout
    assert "Permission denied" in result.stdout
    assert "remedy: check the URL, the credentials" in result.stdout
    assert "not fit for checkpoints" in result.stdout


class LastWins(PosixStorage):
    """A store whose exclusive create is none, without saying so."""

    def put_new(self, path: str, data: Any) -> None:
        self.put(path, data)


def test_a_store_that_lets_several_create_one_name_is_told(tmp_path: Path) -> None:
    check = by_name(LastWins(tmp_path))["exclusive create"]
    assert check.state is State.failed
    assert check.found.startswith("8 of 8")
    assert "may overwrite each other" in check.means


class Stale(PosixStorage):
    """A store behind a cache: what is read is what was read first."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._cache: dict[str, bytes] = {}
        self._cache_lock = threading.Lock()

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        with self._cache_lock:
            return self._cache.setdefault(path, super().read(path, start, end))


def test_a_store_behind_a_cache_is_told(tmp_path: Path) -> None:
    checks = by_name(Stale(tmp_path))
    assert checks["write"].state is State.failed
    assert "consistent" in checks["write"].remedy
    assert "exclusive create" not in checks, "the first failure ends the examination"


def test_a_sound_server(server: FakeS3) -> None:
    checks = by_name(on(server))
    assert {check.state for check in checks.values()} == {State.ok}, checks
    assert list(checks) == [
        "list", "write", "exclusive create", "exclusive multipart", "checksums", "clock", "uploads",
        "latency", "throughput",
    ]  # fmt: skip
    assert not server.objects
    assert not server.uploads


def test_a_server_that_ignores_conditions(server: FakeS3) -> None:
    server.conditions = False
    check = by_name(on(server))["exclusive create"]
    assert check.state is State.failed
    assert "If-None-Match" in check.found
    assert "refused here" in check.means
    assert not server.objects


def test_a_server_that_ignores_conditions_on_uploads_only(server: FakeS3) -> None:
    server.multipart_conditions = False
    checks = by_name(on(server))
    assert checks["exclusive create"].state is State.ok
    assert checks["exclusive multipart"].state is State.warning


def test_a_server_that_takes_any_checksum(server: FakeS3) -> None:
    server.checksums = False
    check = by_name(on(server))["checksums"]
    assert check.state is State.warning
    assert "ckpt verify" in check.remedy
    assert not server.objects


def test_unfinished_uploads_are_counted(server: FakeS3) -> None:
    server.uploads["upload-9"] = {}
    server.begun["upload-9"] = ("run7/steps/x", 0.0)
    check = by_name(on(server))["uploads"]
    assert (check.state, check.found) == (State.warning, "1 unfinished uploads")


def test_credentials_without_permission(server: FakeS3) -> None:
    server.spoils.append(Spoil("PUT", "status", code=(403, "AccessDenied"), times=99))
    checks = by_name(on(server))
    assert checks["write"].state is State.failed
    assert "AccessDenied" in checks["write"].found
    assert "very-secret" not in str(checks)


def test_a_clock_that_is_wrong(server: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.s3_facts._ahead", lambda _headers: -90.0)
    check = by_name(on(server))["clock"]
    assert check.state is State.warning
    assert "90 s behind" in check.found


def test_a_bad_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be at least 1"):
        list(examine(open_storage(tmp_path), size=0))
