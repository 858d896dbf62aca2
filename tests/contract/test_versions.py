"""Versions on every store: what readers find, wait for, lease and copy, with no server."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.publishers import publish

from ckpt.errors import (
    HandoffTimeout,
)
from ckpt.handoff import Registry, Version
from ckpt.layout import MANIFEST
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.storage import Storage, open_storage
from ckpt.versions import read_version

STORES = ["posix", "memory", pytest.param("s3", marks=pytest.mark.s3)]


class Root:
    """A root on one kind of store, and how to open it."""

    def __init__(self, url: str, options: dict[str, Any] | None) -> None:
        self.url, self.options = url, options
        self.storage: Storage = open_storage(url, options)

    def publish(self, run: str = "run7", seed: int = 0) -> str:
        return publish(self.url, run, seed, self.options)

    def registry(self, **more: Any) -> Registry:
        return Registry(self.url, storage_options=self.options, **more)


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
    registry = root.registry()
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
