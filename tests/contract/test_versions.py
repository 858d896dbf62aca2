"""Versions on every store: what readers find, wait for, lease and copy, with no server."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.publishers import publish_to
from support.ranks_faults import Toy
from support.steps import write_writer

from ckpt import CheckpointManager
from ckpt.errors import (
    AlreadyExists,
    ConfigError,
    DamagedError,
    HandoffTimeout,
    NoCheckpoint,
    PublishError,
    StorageError,
)
from ckpt.handoff import Registry, Version
from ckpt.layout import MANIFEST
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.retain import Keeper
from ckpt.storage import Storage, open_storage
from ckpt.types import Retention
from ckpt.versions import delete_version, read_version

STORES = ["posix", "memory", pytest.param("s3", marks=pytest.mark.s3)]


class Root:
    """A root on one kind of store, and how to open it."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        self.url, self.options = url, options
        self.storage: Storage = open_storage(url, options)

    def publish(self, run: str = "run7", seed: int = 0, epoch: int = 1) -> str:
        return publish_to(self.storage, run, seed, epoch=epoch)

    def registry(self, **more: Any) -> Registry:
        return Registry(self.storage, **more)


@pytest.fixture(params=STORES)
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Root]:
    if request.param == "posix":
        made = Root(str(tmp_path / "root"), None)
    elif request.param == "memory":
        made = Root(f"memory://versions-{uuid.uuid4().hex}", None)
    else:
        server = request.getfixturevalue("s3")
        made = Root(server.url("versions"), server.storage_options)
    yield made
    made.storage.close()


def test_a_version_is_what_its_manifest_says(root: Root) -> None:
    registry = Registry(root.url, storage_options=root.options)
    assert registry.latest() is None
    name = root.publish(seed=3)
    version = registry.latest()
    assert isinstance(version, Version)
    manifest = read_version(root.storage, name)
    assert (version.run, version.number, version.name) == ("run7", 1, name)
    assert version.url == f"{root.storage.url}/adapters/{name}"
    assert (version.step, version.policy_version, version.epoch) == (3, 3, 1)
    assert (version.adapter_sha256, version.files) == (manifest.adapter_sha256, manifest.files)
    assert version.created == manifest.created
    assert registry.get(name) == registry.get(1) == registry.get(version) == version
    registry.close()


def test_latest_get_and_newer_than(root: Root) -> None:
    registry = root.registry()
    first, second, third = (root.publish(seed=seed) for seed in range(3))
    latest = registry.latest()
    assert latest is not None
    assert latest.name == third
    assert [version.name for version in registry.newer_than(1)] == [second, third]
    assert [version.name for version in registry.newer_than(None)] == [first, second, third]
    assert registry.newer_than(latest) == registry.newer_than(third) == []


def test_fetch(root: Root, tmp_path: Path) -> None:
    name = root.publish()
    found = root.registry().fetch(1, tmp_path / "cache")
    assert found == tmp_path / "cache" / name
    assert sorted(path.name for path in found.iterdir()) == sorted(
        [MANIFEST, CONFIG_NAME, WEIGHTS_NAME]
    )
    for path in found.iterdir():
        assert path.read_bytes() == root.storage.read(f"adapters/{name}/{path.name}")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [name]


def test_wait_for_times_out(root: Root) -> None:
    began = time.monotonic()
    with pytest.raises(HandoffTimeout, match=r"no version of 'run7' .*within 0\.1 s"):
        root.registry(run="run7").wait_for(None, timeout=0.1)
    assert time.monotonic() - began < 5


def test_what_is_not_whole_is_passed_over(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    names = [root.publish(seed=seed) for seed in range(6)]
    storage, registry = root.storage, root.registry()
    bad = bytearray(storage.read(f"adapters/{names[5]}/{MANIFEST}"))
    bad[len(bad) // 2] ^= 1
    storage.put(f"adapters/{names[5]}/{MANIFEST}", bytes(bad))
    storage.delete(f"adapters/{names[4]}/{WEIGHTS_NAME}")
    storage.put(f"adapters/{names[3]}/{CONFIG_NAME}", b"{}")
    forge(storage, names[2], probe={"schema": 1})
    storage.put_new("adapters/run7-v00000099.claim.json", b"whoever that was")
    if not storage.has_rename:
        storage.put(f"adapters/run7-v00000098/{WEIGHTS_NAME}", b"begun")
    found = registry.latest()
    assert found is not None
    assert found.name == names[1]
    assert registry.latest() == found
    assert [version.name for version in registry.newer_than(None)] == names[:2]
    damaged = [record.message for record in caplog.records]
    assert len(damaged) == 4, "one warning each, not one at every look"
    for name, text in zip(reversed(names[2:]), damaged, strict=True):
        assert f"version {name} is damaged and passed over" in text
    assert "probe" in damaged[3]
    for name in names[2:]:
        with pytest.raises(DamagedError, match=name):
            registry.get(name)
    for gone in (98, 99):
        with pytest.raises(NoCheckpoint, match="no committed version run7-v000000"):
            registry.get(gone)


def forge(storage: Storage, name: str, **changes: Any) -> None:
    """Write a version's manifest anew, valid in itself."""
    changed = dataclasses.replace(read_version(storage, name), **changes)
    storage.put(f"adapters/{name}/{MANIFEST}", changed.to_bytes())


def test_a_look_costs_the_same_at_10_and_at_500_versions(
    root: Root, caplog: pytest.LogCaptureFixture
) -> None:
    """The older ones are no manifests at all: whoever read one would say so."""
    storage = root.storage
    costs = []
    for first, last in ((1, 9), (11, 499)):
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(partial(unreadable, storage), range(first, last + 1)))
        newest = root.publish()
        assert newest == f"run7-v{last + 1:08d}"
        registry = root.registry(run="run7")
        assert registry.latest() is not None  # what a store does once is done
        before = registry.storage.traffic
        found = registry.latest()
        assert found is not None
        assert found.name == newest
        looked = registry.storage.traffic
        with pytest.raises(HandoffTimeout):
            registry.wait_for(newest, timeout=0)
        costs.append(((looked - before).requests, (registry.storage.traffic - looked).requests))
    assert costs[0] == costs[1]
    look, poll = costs[0]
    assert look <= 4  # the names, a manifest, two sizes
    assert poll == 1
    assert not caplog.records


def unreadable(storage: Storage, number: int) -> None:
    storage.put(f"adapters/run7-v{number:08d}/{MANIFEST}", b"never read")


def test_wait_for_sees_a_version_that_comes(root: Root) -> None:
    first = root.publish()
    registry = root.registry()
    assert registry.wait_for(None, timeout=0).name == first
    publisher = threading.Timer(0.3, root.publish)
    publisher.start()
    try:
        found = registry.wait_for(first, timeout=30)
    finally:
        publisher.join()
    assert found.number == 2
    assert registry.wait_for(1, timeout=0) == found
    with pytest.raises(HandoffTimeout, match=r"no version of 'run7' above 2 in .* within 0 s"):
        registry.wait_for(found, timeout=0)


def test_wait_for_gives_the_newest_and_never_an_older_one(root: Root) -> None:
    for _ in range(3):
        root.publish()
    registry = root.registry()
    assert registry.wait_for(1, timeout=0).number == 3
    delete_version(root.storage, "run7-v00000003")
    with pytest.raises(HandoffTimeout):
        registry.wait_for(3, timeout=0)
    assert registry.wait_for(1, timeout=0).number == 2


class Flaky:
    """A store whose listings fail a number of times."""

    def __init__(self, inner: Storage, failures: float) -> None:
        self._inner = inner
        self.failures = failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def list(self, path: str) -> Any:
        if self.failures > 0:
            self.failures -= 1
            raise StorageError("the network is down")
        return self._inner.list(path)


def test_wait_for_outlasts_a_store_that_fails(root: Root, caplog: pytest.LogCaptureFixture) -> None:
    name = root.publish()
    assert Registry(Flaky(root.storage, 3)).wait_for(None, timeout=30, poll_s=0.01).name == name
    assert "the network is down" in caplog.text
    dead = Registry(Flaky(root.storage, float("inf")))
    with pytest.raises(HandoffTimeout, match="the network is down") as caught:
        dead.wait_for(None, timeout=0.05, poll_s=0.01)
    assert isinstance(caught.value.__cause__, StorageError)
    with pytest.raises(StorageError, match="the network is down"):
        dead.latest()


@pytest.mark.parametrize("wrong", [{"timeout": -1}, {"timeout": 1, "poll_s": 0}])
def test_wait_for_refuses_times_that_are_none(root: Root, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="want timeout >= 0 and poll_s > 0"):
        root.registry().wait_for(None, **wrong)


def test_numbers_need_a_run_where_there_are_several(root: Root) -> None:
    one, two = root.publish("one"), root.publish("two")
    registry = root.registry()
    for ask in (registry.latest, lambda: registry.get(1), lambda: registry.newer_than(0)):
        with pytest.raises(ConfigError, match=r"several runs \(one, two\)"):
            ask()
    found = registry.latest("one")
    assert found is not None
    assert found.name == one
    assert registry.get(two).run == "two"
    assert registry.newer_than("one-v00000000") == [found]
    assert root.registry(run="two").get(1).name == two
    assert root.registry(run="three").latest() is None


def test_what_names_no_version(root: Root) -> None:
    registry = root.registry()
    with pytest.raises(NoCheckpoint, match="no version 1 in"):
        registry.get(1)
    root.publish()
    for moving in ("latest", "run7", "run7-v1"):
        with pytest.raises(ConfigError, match="there are no moving names"):
            registry.get(moving)
    for unsafe in ("../x", "", "a/b"):
        with pytest.raises(ConfigError, match="version name must be"):
            registry.get(unsafe)
    with pytest.raises(ConfigError):
        registry.get(-1)
    with pytest.raises(NoCheckpoint):
        registry.get("run7-v00000002")
    with pytest.raises(ConfigError, match="open store already"):
        Registry(root.storage, storage_options={"key": "x"})


def test_leases(root: Root) -> None:
    names = [root.publish(seed=seed) for seed in range(3)]
    registry = root.registry()
    lease = registry.lease(1, "replica-1", 600)
    registry.lease(names[0], "replica-2", 600)
    assert (lease.version, lease.holder) == (names[0], "replica-1")
    assert [held.holder for held in registry.leases(1)] == ["replica-1", "replica-2"]
    keeper = Keeper(root.storage, Retention(versions=1), "run7")
    keeper.prune_versions()
    assert [version.name for version in registry.newer_than(None)] == [names[0], names[2]]
    registry.release(registry.get(1), "replica-1")
    registry.release(1, "replica-1")
    keeper.prune_versions()
    assert registry.get(1).name == names[0]
    registry.release(1, "replica-2")
    assert registry.leases(1) == []
    keeper.prune_versions()
    with pytest.raises(NoCheckpoint):
        registry.get(1)
    with pytest.raises(NoCheckpoint):
        registry.lease(1, "replica-1", 600)
    assert registry.leases(1) == []


def test_a_fetched_version_is_kept_if_it_verifies(root: Root, tmp_path: Path) -> None:
    name = root.publish()
    registry = root.registry()
    found = registry.fetch(1, tmp_path)
    before = {path.name: path.stat().st_ino for path in found.iterdir()}
    assert registry.fetch(name, str(tmp_path)) == found
    assert {path.name: path.stat().st_ino for path in found.iterdir()} == before
    data = bytearray((found / WEIGHTS_NAME).read_bytes())
    data[-1] ^= 1
    (found / WEIGHTS_NAME).write_bytes(data)
    assert registry.fetch(1, tmp_path) == found
    data[-1] ^= 1
    assert (found / WEIGHTS_NAME).read_bytes() == data
    (found / MANIFEST).unlink()
    registry.fetch(1, tmp_path)
    assert (found / MANIFEST).exists()
    assert [path.name for path in tmp_path.iterdir() if name in path.name] == [name]


def test_many_fetch_one_version_at_once(root: Root, tmp_path: Path) -> None:
    name = root.publish()
    cache = tmp_path / "cache"
    start = threading.Barrier(4)

    def fetch(_index: int) -> Path:
        start.wait(30)
        return root.registry().fetch(1, cache)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(fetch, range(4))) == {cache / name}
    assert [path.name for path in cache.iterdir()] == [name]
    inode = (cache / name).stat().st_ino
    root.registry().fetch(1, cache)
    assert (cache / name).stat().st_ino == inode, "what they left verifies"


def test_a_fetch_replaces_nothing_foreign(root: Root, tmp_path: Path) -> None:
    name = root.publish()
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.tex").write_text("mine")
    with pytest.raises(AlreadyExists, match=r"thesis\.tex"):
        root.registry().fetch(1, tmp_path)
    assert [path.name for path in (tmp_path / name).iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError):
        root.registry().fetch(1, tmp_path / "file")
    with pytest.raises(ConfigError, match="a directory of this machine"):
        root.registry().fetch(1, "memory://elsewhere")


@pytest.mark.parametrize("file", [WEIGHTS_NAME, CONFIG_NAME])
@pytest.mark.parametrize("place", [0, -1])
def test_a_damaged_version_is_never_fetched(
    root: Root, tmp_path: Path, file: str, place: int
) -> None:
    name = root.publish()
    data = bytearray(root.storage.read(f"adapters/{name}/{file}"))
    data[place] ^= 0x10
    root.storage.put(f"adapters/{name}/{file}", bytes(data))
    cache = tmp_path / "cache"
    with pytest.raises(DamagedError, match=file):
        root.registry().fetch(1, cache)
    assert list(cache.iterdir()) == []


def test_the_digest_of_the_weights_counts(root: Root, tmp_path: Path) -> None:
    forge(root.storage, root.publish(), adapter_sha256="0" * 64)
    with pytest.raises(DamagedError, match="SHA-256"):
        root.registry().fetch(1, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


class Vanishing:
    """A store in which the first read of weights finds the version deleted."""

    def __init__(self, inner: Storage, *, whole: bool) -> None:
        self._inner = inner
        self._whole = whole

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        directory = path.rpartition("/")[0]
        if self._whole:
            self._inner.delete_tree(directory)
        else:
            self._inner.delete(path)
        self._inner.read_into(path, start, target)


def test_a_version_that_is_deleted_while_it_is_fetched(root: Root, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    root.publish()
    with pytest.raises(DamagedError, match="version run7-v00000001 is damaged"):
        Registry(Vanishing(root.storage, whole=False)).fetch(1, cache)
    root.publish()
    with pytest.raises(NoCheckpoint, match="was deleted while it was copied; take a lease first"):
        Registry(Vanishing(root.storage, whole=True)).fetch(2, cache)
    assert list(cache.iterdir()) == []


def test_many_blocks(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are read in parallel and put together in order; a flipped bit in any is found."""
    for module in ("types", "checksum"):
        monkeypatch.setattr(f"ckpt.{module}.BLOCK_BYTES", 64)
    monkeypatch.setattr("ckpt.checksum.Crc32Blocks.__init__.__defaults__", (64,))
    name = root.publish()
    version = root.registry().get(1)
    assert max(len(file.block_crc32) for file in version.files) > 10
    found = root.registry().fetch(1, tmp_path)
    weights = root.storage.read(f"adapters/{name}/{WEIGHTS_NAME}")
    assert (found / WEIGHTS_NAME).read_bytes() == weights


def test_numbers_grow_when_training_goes_back(root: Root) -> None:
    """A resume from an older step: the step is smaller, the number is not."""
    for step in (100, 200):
        root.publish(seed=step)
    write_writer(root.storage, 1)
    write_writer(root.storage, 2, parent=(100, 1))
    with pytest.raises(PublishError, match="writer 2 has taken over"):
        root.publish(seed=201)
    root.publish(seed=101, epoch=2)
    found = [(v.number, v.step) for v in root.registry().newer_than(None)]
    assert found == [(1, 100), (2, 200), (4, 101)]


def test_numbers_grow_when_a_trainer_resumes_from_an_older_step(root: Root) -> None:
    """With a retention that keeps one version, so that the older numbers leave no trace."""
    keep = Retention(latest=9, versions=1)

    def train(resume_from: int | None, steps: range) -> None:
        toy = Toy(tag="v")
        with CheckpointManager(
            root.url, run_name="run7", retention=keep, storage_options=root.options
        ) as manager:
            assert manager.restore(toy.state, step=resume_from) == resume_from
            for step in steps:
                toy.step()
                manager.save(step, toy.state, publish=True)

    train(None, range(4))
    registry = root.registry()
    before = registry.latest()
    assert before is not None
    assert (before.number, before.step, before.epoch) == (4, 3, 1)
    train(1, range(2, 3))
    after = registry.wait_for(before, timeout=0)
    assert (after.number, after.step, after.epoch) == (5, 2, 2)
    assert after.adapter_sha256 != before.adapter_sha256
    assert registry.newer_than(None) == [after]
