"""Which store stands behind which URL."""

from __future__ import annotations

import pickle
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ckpt.errors import ConfigError, StorageError, StoreNotExclusive
from ckpt.storage import open_storage
from ckpt.storage.fsspec_store import FsspecStorage
from ckpt.storage.posix import PosixStorage
from ckpt.storage.redact import Redactor, public_url
from ckpt.storage.s3 import S3Storage


def test_paths_are_posix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in (tmp_path / "r", str(tmp_path / "r"), f"file://{tmp_path}/r"):
        storage = open_storage(url)
        assert isinstance(storage, PosixStorage)
        assert storage.url == str(tmp_path / "r")
    monkeypatch.chdir(tmp_path)
    assert open_storage("r").url == str(tmp_path / "r")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("~/r").url == str(tmp_path / "r")
    assert open_storage(f"file://{tmp_path}/a%20b").url == str(tmp_path / "a b")


def test_urls_are_object_stores() -> None:
    assert isinstance(open_storage("memory://x"), FsspecStorage)
    for scheme in ("s3", "s3a"):
        storage = open_storage(f"{scheme}://bucket/a//b/")
        assert isinstance(storage, S3Storage)
        assert storage.url == "s3://bucket/a/b"


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("", None, "the path of a store is empty"),
        ("/tmp/x", {"key": "1"}, "storage_options are for object stores"),
        ("file://host/x", None, "on another machine"),
        ("nosuch://x/y", None, "cannot open a 'nosuch' store"),
        ("simplecache::s3://b/x", None, "must be a plain URL without '::'"),
        ("memory://x?a=1", None, "must be a plain URL"),
    ],
)
def test_what_cannot_be_opened(url: str, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_storage(url, options)


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"gs://bucket/x: cannot open a 'gs' store: .*gcsfs"):
        open_storage("gs://bucket/x")


def test_local_runs_do_not_import_s3(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom ckpt.storage import open_storage\n"
        f"open_storage({str(tmp_path)!r}).put('x', b'1')\n"
        "assert not {'s3fs', 'botocore'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_backend_of_s3_is_a_choice() -> None:
    from ckpt.storage.s3_obstore import ObstoreStorage

    for backend, kind in (("s3fs", S3Storage), ("obstore", ObstoreStorage)):
        store = open_storage("s3://bucket/run", {"backend": backend})
        assert type(store) is kind
        assert type(pickle.loads(pickle.dumps(store))) is kind
    assert type(open_storage("s3://bucket/run")) is S3Storage
    with pytest.raises(ConfigError, match=r"backend must be one of .* got 'boto'"):
        open_storage("s3://bucket/run", {"backend": "boto"})


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ckpt.storage.s3_obstore", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'archon-lora\[obstore\]'"):
        open_storage("s3://bucket/run", {"backend": "obstore"})


def test_a_store_without_exclusive_create_is_refused(tmp_path: Path) -> None:
    storage = open_storage(f"local://{tmp_path}/x", {"auto_mkdir": True})
    storage.put("a", b"1")
    assert storage.read("a") == b"1"
    with pytest.raises(StoreNotExclusive, match=r"a 'local' store has no exclusive create.*use S3"):
        storage.put_new("b", b"1")
    assert not storage.exists("b")


def test_a_store_that_overwrites_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"memory://{uuid.uuid4().hex}")
    real = type(storage._fs).pipe_file
    monkeypatch.setattr(
        type(storage._fs), "pipe_file", lambda self, path, value, **kw: real(self, path, value)
    )
    with pytest.raises(StoreNotExclusive, match="overwrites on an exclusive create"):
        storage.put_new("b", b"1")
    assert storage.list("") == []


def test_errors_of_any_file_system_become_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(f"memory://{uuid.uuid4().hex}", {"token": "hush-hush"})

    class Odd(Exception):
        pass

    def broken(*args: object, **kwargs: object) -> None:
        raise Odd("failed with hush-hush at http://me:word@host/x?sig=abc")

    monkeypatch.setattr(type(storage._fs), "cat_file", broken)
    with pytest.raises(StorageError, match=r"x: read failed: Odd: failed with \*\*\*") as caught:
        storage.read("x")
    assert not {"hush", "word", "abc"} & set(str(caught.value).replace("/", " ").split())
    assert "hush" not in str(caught.value)
    assert "me:word" not in str(caught.value)
    assert "sig=abc" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_redaction() -> None:
    redact = Redactor(
        {
            "key": "AKIAABCDEF",
            "secret": "s3cr",
            "endpoint_url": "http://host:9000",
            "client_kwargs": {"aws_session_token": "tok", "region_name": "eu-central-1"},
            "config_kwargs": {"signature_version": "s3v4", "proxies": {"http": "http://u:p@proxy"}},
            "anon": False,
        }
    )
    text = redact("AKIAABCDEF s3cr tok eu-central-1 s3v4 http://host:9000 https://a:b@c/d?e=f#g")
    assert text == "*** *** *** eu-central-1 s3v4 http://host:9000 https://***@c/d?***"
    assert "AKIA" not in repr(redact)
    assert public_url("https://a:b@c/d?e=f#g") == "https://c/d"
