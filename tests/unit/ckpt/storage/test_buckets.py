"""Google's and Azure's stores through fsspec: what they must keep, and what is said if not."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from fsspec.registry import _registry
from support.buckets import GoogleBuckets, registered
from support.tiny_run import Run

from ckpt import AlreadyExists, CheckpointManager, ConfigError, StorageError, StoreNotExclusive
from ckpt.storage import open_storage
from ckpt.versions import read_version

URLS = ["gs://bucket/run", "az://container/run", "abfs://container/run"]


@pytest.fixture(autouse=True)
def _buckets() -> Iterator[None]:
    with registered():
        yield


@pytest.mark.parametrize("url", URLS)
def test_a_run_is_saved_resumed_and_published(url: str) -> None:
    run = Run()
    with CheckpointManager(url) as manager:
        assert manager.restore(run.state) is None
        first = run.train(3)
        version = manager.save(2, run.state, publish=True).published.result(60)
        last = run.train(2)
    resumed = Run(seed=99)
    with CheckpointManager(url) as manager:
        assert manager.restore(resumed.state) == 2
        assert resumed.train(2) == last
    assert len(first) == 3
    assert read_version(open_storage(url), version.name) == version


@pytest.mark.parametrize("url", URLS)
def test_a_create_whose_answer_was_lost_and_that_was_repeated_is_ours(url: str) -> None:
    store = open_storage(url, {"repeats": True})
    store.put_new("claims/1", b"mine")
    assert store.read("claims/1") == b"mine"
    with pytest.raises(AlreadyExists):
        store.put_new("claims/1", b"somebody else's")


@pytest.mark.parametrize("url", URLS)
def test_a_version_of_the_package_that_overwrites_is_refused(url: str) -> None:
    run = Run()
    run.step()
    store = open_storage(url, {"ignores_mode": True})
    with pytest.raises(StoreNotExclusive, match="overwrites on an exclusive create"):
        store.put_new("claims/1", b"1")
    manager = CheckpointManager(url, storage_options={"ignores_mode": True})
    with pytest.raises(StoreNotExclusive):
        manager.save(0, run.state)
    manager.close()
    assert store.list("steps") == []


@pytest.mark.parametrize("url", URLS)
def test_no_error_shows_a_secret(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "Z2VoZWltIQ=="
    monkeypatch.setattr(GoogleBuckets, "broken", f"403: signed with {secret}")
    store = open_storage(url, {"account_key": secret, "token": secret})
    with pytest.raises(StorageError, match="403") as caught:
        store.put("x", b"1")
    assert secret not in str(caught.value)
    assert secret not in repr(caught.value.__cause__)


@pytest.mark.parametrize(("url", "package"), [("gs://b/x", "gcsfs"), ("az://c/x", "adlfs")])
def test_a_missing_package_is_named(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(_registry, url.partition(":")[0])
    monkeypatch.setitem(sys.modules, package, None)  # not installed, whatever is
    with pytest.raises(ConfigError, match=package) as caught:
        open_storage(url)
    assert "store" in str(caught.value)
