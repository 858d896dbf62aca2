"""Unfinished uploads: which go, which stay, and how old they are by whose clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
from support.fake_s3 import FakeS3, Spoil, fake_s3

from ckpt.cli_uploads import age, upload_rows
from ckpt.errors import ConfigError, StorageError
from ckpt.storage import open_storage
from ckpt.storage.retry import RetryPolicy
from ckpt.storage.s3 import S3Storage
from ckpt.storage.s3_reap import reap_uploads

HOUR = 3600.0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with fake_s3() as server:
        for number, (key, hours) in enumerate(
            [("run/a", 30), ("run/b", 23), ("run/a", 1.5), ("run/c", 25), ("run2/x", 99), ("y", 99)]
        ):
            server.uploads[f"u{number}"] = {1: b"part"}
            server.begun[f"u{number}"] = (key, time.time() - hours * HOUR)
        yield server


@pytest.fixture
def store(fake: FakeS3) -> Iterator[S3Storage]:
    policy = RetryPolicy(attempts=2, base=0.01)
    options = {"endpoint_url": fake.url, "key": "access-key", "secret": "secret-key"}
    storage = S3Storage("s3://bucket/run", options, policy)
    yield storage
    storage.close()


def test_old_uploads_below_the_root_go(fake: FakeS3, store: S3Storage) -> None:
    gone, stay = reap_uploads(store)
    assert [(upload.path, upload.upload_id) for upload in gone] == [("a", "u0"), ("c", "u3")]
    assert [(upload.path, upload.upload_id) for upload in stay] == [("a", "u2"), ("b", "u1")]
    assert sorted(fake.uploads) == ["u1", "u2", "u4", "u5"]


def test_a_dry_run_aborts_nothing(fake: FakeS3, store: S3Storage) -> None:
    gone, stay = reap_uploads(store, timedelta(0), dry_run=True)
    assert len(gone) == 4
    assert not stay
    assert len(fake.uploads) == 6
    assert not fake.requests("DELETE")


def test_age_is_the_servers(fake: FakeS3, store: S3Storage, monkeypatch) -> None:
    """A clock of ours that runs a year ahead must not make a running upload look old."""
    from ckpt.storage import s3_reap

    class Ahead(s3_reap.datetime):
        @classmethod
        def now(cls, tz=None):
            return super().now(tz) + timedelta(days=365)

    monkeypatch.setattr(s3_reap, "datetime", Ahead)
    gone, _ = reap_uploads(store)
    assert [upload.upload_id for upload in gone] == ["u0", "u3"]
    assert timedelta(hours=29) < gone[0].age < timedelta(hours=31)


def test_no_upload_begins_in_the_future(fake: FakeS3, store: S3Storage) -> None:
    """The server's date has whole seconds, the start of an upload has fractions."""
    fake.begun["u1"] = ("run/b", time.time() + 30.0)
    gone, stay = reap_uploads(store, timedelta(0))
    assert not stay
    assert [upload.age for upload in gone if upload.upload_id == "u1"] == [timedelta(0)]


def test_an_upload_that_ends_meanwhile_is_fine(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("DELETE", "status", (404, "NoSuchUpload"))]
    assert len(reap_uploads(store)[0]) == 2


def test_a_refusal_is_told(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("DELETE", "status", (403, "AccessDenied"), times=9)]
    with pytest.raises(StorageError, match="run/a: abort failed: HTTP 403 AccessDenied"):
        reap_uploads(store)
    assert len(fake.uploads) == 6


def test_only_s3_has_uploads(tmp_path, store: S3Storage) -> None:
    with pytest.raises(ConfigError, match="only S3 stores have unfinished uploads"):
        reap_uploads(open_storage(tmp_path))
    with pytest.raises(ConfigError, match="must not be negative"):
        reap_uploads(store, timedelta(seconds=-1))


def test_rows_say_why(store: S3Storage) -> None:
    rows = upload_rows(store, age("24h"), dry_run=True)
    assert [(row["path"], row["keep"], row["reason"]) for row in rows] == [
        ("a", False, "upload began 30h ago, older than 24h"),
        ("a", True, "upload began 90m ago, younger than 24h"),
        ("b", True, "upload began 23h ago, younger than 24h"),
        ("c", False, "upload began 25h ago, older than 24h"),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("24h", 86400), ("7d", 604800), (" 0s", 0)]
)
def test_ages(text: str, seconds: int) -> None:
    assert age(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1.5h", "1w", "1h30m"])
def test_what_is_no_age(text: str) -> None:
    with pytest.raises(ConfigError, match="must be like 90s"):
        age(text)
