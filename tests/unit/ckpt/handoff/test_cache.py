"""The cache of versions: bounded, verified, and it keeps what may still be read."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from support.published import damage, publish_one

from ckpt.errors import (
    CacheFull,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    StorageError,
    TooLargeForCache,
)
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.registry import Registry
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.storage import faultpoints
from ckpt.storage.faultpoints import ENVIRONMENT, POSIX_POINTS


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    root = tmp_path / "root"
    for seed in range(4):
        publish_one(root, seed=seed)
    return Registry(root, run="run7")


def names(cache: VersionCache) -> list[str]:
    return [entry.name for entry in cache.entries()]


def name(number: int) -> str:
    return f"run7-v{number:08d}"


def test_a_version_is_pulled_once_and_found_without_the_root(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = VersionCache(tmp_path / "cache")
    version = registry.get(1)
    path = cache.get(registry, version)
    assert path == tmp_path / "cache" / name(1)
    assert {file.name for file in path.iterdir()} == {WEIGHTS_NAME, CONFIG_NAME, "MANIFEST.json"}
    monkeypatch.setattr(Registry, "place", lambda *_: pytest.fail("pulled again"))
    assert cache.get(registry, version) == path
    cache.close()
    again = VersionCache(tmp_path / "cache")
    found = again.find(name(1))
    assert found is not None
    assert found.adapter_sha256 == version.adapter_sha256
    assert again.get(registry, version) == path
    assert again.find(name(2)) is None
    assert again.find("../root") is None


def test_nothing_is_deleted_before_it_is_known_what_is_in_use(
    registry: Registry, tmp_path: Path
) -> None:
    cache = VersionCache(tmp_path / "cache", max_versions=2)
    for number in (1, 2):
        cache.get(registry, registry.get(number))
    with pytest.raises(CacheFull, match="their use unknown"):
        cache.get(registry, registry.get(3))
    assert names(cache) == [name(1), name(2)]
    cache.use([])
    cache.get(registry, registry.get(3))
    assert names(cache) == [name(2), name(3)]


def test_the_oldest_goes_but_never_what_is_in_use_or_on_its_way(
    registry: Registry, tmp_path: Path
) -> None:
    cache = VersionCache(tmp_path / "cache", max_versions=2)
    cache.use([name(1)])
    cache.get(registry, registry.get(1))
    cache.get(registry, registry.get(2))
    with pytest.raises(CacheFull, match=r"1 in use.*2 versions; raise them"):
        cache.get(registry, registry.get(3))  # 2 was pulled last: an engine may be about to load it
    assert names(cache) == [name(1), name(2)]
    cache.use([name(2)])
    cache.get(registry, registry.get(3))
    assert names(cache) == [name(2), name(3)]
    cache.use([])
    assert cache.evict() == []
    cache.get(registry, registry.get(4))
    assert names(cache) == [name(3), name(4)]


def test_bytes_bound_the_cache_too(registry: Registry, tmp_path: Path) -> None:
    one = registry.get(1).bytes
    cache = VersionCache(tmp_path / "cache", max_bytes=2 * one + one // 2)
    cache.use([])
    sizes = []
    for number in (1, 2, 3, 4):
        cache.get(registry, registry.get(number))
        sizes.append(sum(entry.bytes for entry in cache.entries()))
    assert max(sizes) <= 2 * one + one // 2
    assert name(4) in names(cache)


def test_for_what_can_never_fit_nothing_is_deleted(registry: Registry, tmp_path: Path) -> None:
    one = registry.get(1).bytes
    first = VersionCache(tmp_path / "cache")
    first.get(registry, registry.get(1))
    first.close()
    cache = VersionCache(tmp_path / "cache", max_bytes=one)
    cache.use([])
    large = replace(registry.get(2), files=registry.get(2).files * 2)
    with pytest.raises(TooLargeForCache, match=f"bounds of .* are {one} bytes.*raise them"):
        cache.get(registry, large)
    assert names(cache) == [name(1)]


def test_what_was_unloaded_stays_for_its_grace(registry: Registry, tmp_path: Path) -> None:
    clock = Clock()
    cache = VersionCache(tmp_path / "cache", max_versions=2, grace_s=60, clock=clock)
    cache.use([name(1), name(2)])
    for number in (1, 2):
        cache.get(registry, registry.get(number))
    clock.now += 1000
    cache.use([name(2)])  # 1 was in use until now
    clock.now += 59
    with pytest.raises(CacheFull):
        cache.get(registry, registry.get(3))
    clock.now += 1
    cache.get(registry, registry.get(3))
    assert names(cache) == [name(2), name(3)]


def test_after_a_restart_everything_has_its_grace_again(registry: Registry, tmp_path: Path) -> None:
    first = VersionCache(tmp_path / "cache", max_versions=2, grace_s=60)
    for number in (1, 2):
        first.get(registry, registry.get(number))
    first.close()
    clock = Clock()
    cache = VersionCache(tmp_path / "cache", max_versions=2, grace_s=60, clock=clock)
    cache.use([])
    with pytest.raises(CacheFull, match="within 60 s of their last use"):
        cache.get(registry, registry.get(3))
    clock.now += 60
    cache.get(registry, registry.get(3))
    assert names(cache) == [name(2), name(3)]


def test_a_damaged_version_never_enters(registry: Registry, tmp_path: Path) -> None:
    damage(tmp_path / "root", name(2))
    cache = VersionCache(tmp_path / "cache")
    with pytest.raises(DamagedError, match=r"CRC32|SHA-256"):
        cache.get(registry, registry.get(2))
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".lock"]


def weights_of(registry: Registry, number: int) -> Path:
    return Path(registry.get(number).url) / WEIGHTS_NAME


def test_on_the_roots_file_system_the_weights_are_a_link(
    registry: Registry, tmp_path: Path
) -> None:
    root = weights_of(registry, 1)
    data = root.read_bytes()
    path = VersionCache(tmp_path / "cache").get(registry, registry.get(1))
    assert (path / WEIGHTS_NAME).samefile(root)
    # What is deleted at the root stays whole here.
    shutil.rmtree(root.parent)
    assert (path / WEIGHTS_NAME).read_bytes() == data


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_where_no_link_can_be_made_it_is_a_copy(
    code: int, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    version, root = registry.get(1), weights_of(registry, 1)
    monkeypatch.setattr(os, "link", refuse)
    path = VersionCache(tmp_path / "cache").get(registry, version)
    assert not (path / WEIGHTS_NAME).samefile(root)
    assert (path / WEIGHTS_NAME).read_bytes() == root.read_bytes()


def test_a_link_that_fails_otherwise_is_said(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    version, cache = registry.get(1), VersionCache(tmp_path / "cache")
    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StorageError, match="cannot be linked to"):
        cache.get(registry, version)
    assert names(cache) == []


def test_weights_that_are_gone_are_damage_or_a_deleted_version(
    registry: Registry, tmp_path: Path
) -> None:
    cache = VersionCache(tmp_path / "cache")
    version = registry.get(1)
    weights_of(registry, 1).unlink()
    with pytest.raises(DamagedError, match="is damaged"):
        cache.get(registry, version)
    shutil.rmtree(version.url)
    with pytest.raises(NoCheckpoint, match="was deleted"):
        cache.get(registry, version)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_waits_for_no_disk_and_a_copy_does(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    cache, version = VersionCache(tmp_path / "cache"), registry.get(1)
    monkeypatch.setattr(os, "fsync", synced.append)
    cache.get(registry, version)
    assert synced == []
    registry.fetch(version, tmp_path / "copy")
    assert len(synced) >= 4  # three files and the directory
    copied = tmp_path / "copy" / version.name / WEIGHTS_NAME
    assert not copied.samefile(weights_of(registry, 1))


def test_a_manifest_is_read_once(registry: Registry, tmp_path: Path) -> None:
    version, cache = registry.get(1), VersionCache(tmp_path / "cache")
    before = registry.storage.traffic.received
    cache.get(registry, version)
    config = next(file.size for file in version.files if file.name == CONFIG_NAME)
    assert registry.storage.traffic.received - before == config  # and the link


@pytest.mark.parametrize("harm", ["byte", "short", "foreign manifest", "no config"])
def test_a_copy_that_rotted_is_replaced(harm: str, registry: Registry, tmp_path: Path) -> None:
    cache = VersionCache(tmp_path / "cache")
    path = cache.get(registry, registry.get(1))
    whole = (path / WEIGHTS_NAME).read_bytes()
    cache.close()
    if harm in ("byte", "short"):
        (path / WEIGHTS_NAME).unlink()  # the root has the same file
    if harm == "byte":
        (path / WEIGHTS_NAME).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "short":
        (path / WEIGHTS_NAME).write_bytes(whole[:-1])
    elif harm == "no config":
        (path / CONFIG_NAME).unlink()
    else:
        other = Path(registry.get(2).url) / "MANIFEST.json"
        (path / "MANIFEST.json").write_bytes(other.read_bytes())
    cache = VersionCache(tmp_path / "cache")
    assert cache.find(name(1)) is None
    assert cache.get(registry, registry.get(1)) == path
    assert (path / WEIGHTS_NAME).read_bytes() == whole
    assert cache.find(name(1)) is not None


def test_weights_that_nobody_published_spoil_an_entry(registry: Registry, tmp_path: Path) -> None:
    cache = VersionCache(tmp_path / "cache")
    path = cache.get(registry, registry.get(1))
    cache.close()
    (path / "extra.safetensors").write_bytes(b"x")
    assert VersionCache(tmp_path / "cache").find(name(1)) is None


def test_another_roots_version_of_the_same_name_is_refused(
    registry: Registry, tmp_path: Path
) -> None:
    publish_one(tmp_path / "other", seed=9)
    other = Registry(tmp_path / "other", run="run7")
    cache = VersionCache(tmp_path / "cache")
    path = cache.get(registry, registry.get(1))
    before = (path / WEIGHTS_NAME).read_bytes()
    with pytest.raises(ConfigError, match="a cache belongs to one root"):
        cache.get(other, other.get(1))
    assert (path / WEIGHTS_NAME).read_bytes() == before


def test_a_cache_that_is_bound_takes_no_other_root(registry: Registry, tmp_path: Path) -> None:
    cache = VersionCache(tmp_path / "cache", root="s3://bucket/one")
    cache.get(registry, registry.get(1))
    cache.close()
    with pytest.raises(ConfigError, match="versions of s3://bucket/one, not of s3://bucket/two"):
        VersionCache(tmp_path / "cache", root="s3://bucket/two")
    VersionCache(tmp_path / "cache", root="s3://bucket/one").close()
    (tmp_path / "cache" / ".root").unlink()
    with pytest.raises(ConfigError, match="not the name of their root"):
        VersionCache(tmp_path / "cache", root="s3://bucket/one")


def test_a_cache_has_one_owner_at_a_time(tmp_path: Path) -> None:
    cache = VersionCache(tmp_path / "cache")
    with pytest.raises(ConfigError, match="in use by another process"):
        VersionCache(tmp_path / "cache")
    cache.close()
    VersionCache(tmp_path / "cache").close()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_bytes": 0}, "1 bytes"), ({"max_versions": 1}, "2 versions"), ({"grace_s": -1}, "0 s")],
)
def test_bounds_that_hold_nothing_are_refused(
    options: dict[str, int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        VersionCache(tmp_path / "cache", **options)  # type: ignore[arg-type]


def pull_and_die(root: str, directory: str, point: str) -> None:
    """The process that is killed. Forked, so that not every case imports torch."""
    os.environ[ENVIRONMENT] = f"{point}=kill"
    faultpoints.forget()
    registry = Registry(root, run="run7")
    VersionCache(directory).get(registry, registry.get(1))


@pytest.mark.filterwarnings("ignore:.*fork.*may lead to deadlocks:DeprecationWarning")
@pytest.mark.parametrize("point", [point for point in POSIX_POINTS if ".put_new." not in point])
def test_a_killed_pull_leaves_nothing_that_counts_and_the_next_owner_clears_it(
    point: str, registry: Registry, tmp_path: Path
) -> None:
    args = (str(tmp_path / "root"), str(tmp_path / "cache"), point)
    puller = multiprocessing.get_context("fork").Process(target=pull_and_die, args=args)
    puller.start()
    puller.join(timeout=60)
    assert puller.exitcode == -signal.SIGKILL
    there = point == "posix.rename_dir.after"
    left = {item.name for item in (tmp_path / "cache").iterdir()} - {".lock"}
    assert [item for item in left if not item.startswith(".tmp-")] == [name(1)] * there
    assert left
    cache = VersionCache(tmp_path / "cache")
    kept = {item.name for item in (tmp_path / "cache").iterdir()} - {".lock"}
    assert kept == ({name(1)} if there else set())
    assert (cache.find(name(1)) is not None) == there
    cache.get(registry, registry.get(1))
    assert names(cache) == [name(1)]
    assert cache.find(name(1)) is not None


def test_foreign_files_are_left_alone(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "cache" / "mine").mkdir(parents=True)
    (tmp_path / "cache" / "note.txt").write_text("x")
    cache = VersionCache(tmp_path / "cache", max_versions=2)
    cache.use([])
    for number in (1, 2, 3):
        cache.get(registry, registry.get(number))
    assert names(cache) == [name(2), name(3)]
    assert (tmp_path / "cache" / "note.txt").is_file()
    assert (tmp_path / "cache" / "mine").is_dir()
