"""Versions on a node's own disk, where engines read them: whole, verified, and within bounds.

Every version has a directory of its own under its own name, which appears by one rename. One
process owns a cache at a time; the system gives the lock up when that process dies, and the next
owner removes what was half made. What an engine may still read is never deleted: the owner says
what that is (:meth:`VersionCache.use`), and until it has, nothing is. Nor is what was pulled last:
it is on its way to an engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from ckpt.catalog import check_bytes
from ckpt.errors import (
    CacheFull,
    ConfigError,
    DamagedError,
    ObjectNotFound,
    StorageError,
    TooLargeForCache,
)
from ckpt.layout import (
    MANIFEST,
    TMP_PREFIX,
    TRASH_PREFIX,
    parse_version_name,
    trash_path,
)
from ckpt.locks import FileLock
from ckpt.manifest import VersionManifest
from ckpt.peft import WEIGHTS_NAME
from ckpt.storage.posix import PosixStorage

from .registry import Version

LOCK: Final = ".lock"
ROOT: Final = ".root"
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt")

_UNKNOWN: Final = "their use unknown, for an engine has not answered even once"

log = logging.getLogger(__name__)


class Source(Protocol):
    """Where versions come from; a :class:`~ckpt.handoff.registry.Registry` is one."""

    def place(self, v: Version, into: Path) -> Path:
        """Make ``into/<name>`` with the version's verified files, all of it or nothing."""
        ...


@dataclass(frozen=True, slots=True)
class CachedVersion:
    """A version in the cache (size of its adapter files in bytes)."""

    name: str
    bytes: int


class VersionCache:
    """The versions in one directory.

    Args:
        directory: where they lie; made if need be, and this cache's alone.
        max_bytes: bound on the size of all versions together, or None.
        max_versions: bound on their number, or None; at least what is served and its successor.
        grace_s: seconds for which a version stays after it was last in use: requests that began
            before an unload may still make an engine read its file.
        root: where its versions come from. Given, the directory is bound to it at the first use.
        clock: seconds that only grow; for tests.

    Raises:
        ConfigError: a bound that holds nothing, another process owns the directory, or it is bound
            to another root.
        StorageError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_bytes: int | None = None,
        max_versions: int | None = None,
        grace_s: float = 0.0,
        root: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for what, bound, least in (("bytes", max_bytes, 1), ("versions", max_versions, 2)):
            if bound is not None and bound < least:
                msg = f"a cache needs room for at least {least} {what}, got {bound}"
                raise ConfigError(msg)
        if not grace_s >= 0:
            msg = f"the cache's grace must be 0 s or more, got {grace_s}"
            raise ConfigError(msg)
        self._dir = Path(os.path.realpath(Path(directory).expanduser()))
        self._max_bytes, self._max_versions = max_bytes, max_versions
        self._grace_s, self._clock = grace_s, clock
        self._pulling = threading.Lock()  # one pull at a time; held while the store is asked
        self._mutex = threading.RLock()  # never held while the store is asked
        self._newest: str | None = None
        self.evicted = 0
        """How many versions were deleted to keep within the bounds."""
        self._in_use: frozenset[str] | None = None
        self._last_used: dict[str, float] = {}
        self._verified: dict[str, VersionManifest] = {}
        self._lock = _own(self._dir)
        try:
            self._store = PosixStorage(self._dir)
            self._opened = clock()
            self._remove_remains()
            if root is not None:
                self._bind(root)
        except BaseException:
            self._lock.release()
            raise

    @property
    def directory(self) -> Path:
        """Where the versions lie, links resolved: the path that engines are given."""
        return self._dir

    @property
    def in_use(self) -> frozenset[str] | None:
        """Names that are never deleted; None: not known yet, so nothing is."""
        return self._in_use

    def close(self) -> None:
        """Give the directory up; what lies in it stays."""
        self._lock.release()

    def use(self, names: Iterable[str]) -> None:
        """Say what engines may still read; replaces what was said before.

        What is no longer named stays for the time of grace, counted from now.
        """
        with self._mutex:
            now = self._clock()
            for name in self._in_use or ():
                self._last_used[name] = now
            self._in_use = frozenset(names)

    def use_also(self, name: str) -> None:
        """Say that engines may read one more, where it is known what they read."""
        with self._mutex:
            if self._in_use is not None:
                self._in_use |= {name}

    def entries(self) -> list[CachedVersion]:
        """What lies in the cache, oldest number first."""
        found = []
        for entry in self._store.list(""):
            if entry.is_dir and parse_version_name(entry.name) is not None:
                files = self._store.list(entry.name)
                size = sum(file.size for file in files if file.name != MANIFEST)
                found.append(CachedVersion(entry.name, size))
        return sorted(found, key=lambda item: parse_version_name(item.name) or ("", 0))

    def find(self, name: str) -> VersionManifest | None:
        """The manifest of a version that lies here whole, or None; asks no store.

        Its bytes are read and verified the first time that this owner asks for it.
        """
        if parse_version_name(name) is None or not (self._dir / name).is_dir():
            self._verified.pop(name, None)
            return None
        known = self._verified.get(name)
        if known is None:
            try:
                known = self._check(name)
            except (DamagedError, ObjectNotFound) as error:
                log.warning("%s in the cache is not whole: %s", name, error)
                return None
            self._verified[name] = known
        return known

    def path(self, name: str) -> Path:
        """The directory of a version, whether or not it is there.

        Raises:
            ConfigError: not a version's name.
        """
        if parse_version_name(name) is None:
            msg = f"{name!r} is not a version's name; they are named like 'run7-v00000042'"
            raise ConfigError(msg)
        return self._dir / name

    def get(self, registry: Source, version: Version) -> Path:
        """The directory of a version, from here or else pulled.

        Args:
            registry: where to pull it from.
            version: what is wanted.

        Raises:
            NoCheckpoint: the version is gone.
            CacheFull: the bounds leave no room beside what may not be deleted.
            TooLargeForCache: they never will; nothing was deleted for it.
            ConfigError: another adapter of that name lies here: the cache is another root's.
            DamagedError: the version's bytes do not verify.
            StorageError: the root, or the disk, failed.
        """
        target = self.path(version.name)
        with self._pulling:
            held = self.find(version.name)
            if held is None:
                self._make_room(version.bytes, version.name)
                registry.place(version, self._dir)
                self._verified[version.name] = self._read_manifest(version.name)
            elif held.adapter_sha256 != version.adapter_sha256:
                msg = (
                    f"{target} holds another adapter than {version.url}: a cache belongs to one "
                    "root; give every root a directory of its own"
                )
                raise ConfigError(msg)
            with self._mutex:
                self._newest = version.name
                self._last_used[version.name] = self._clock()
            return target

    def doubt(self, name: str) -> None:
        """Verify a version anew before it is used again."""
        self._verified.pop(name, None)

    def evict(self) -> list[str]:
        """Delete what the bounds have no room for and nobody uses; the names that went."""
        return self._evict(0, 0, None)

    def _make_room(self, size: int, name: str) -> None:
        if self._max_bytes is not None and size > self._max_bytes:
            msg = (
                f"{name} has {size} bytes, and the bounds of {self._dir} are {self._bounds()}: it "
                "can never lie there; raise them"
            )
            raise TooLargeForCache(msg)
        self._evict(size, 1, name)
        others = [entry for entry in self.entries() if entry.name != name]
        total = sum(entry.bytes for entry in others)
        too_big = self._max_bytes is not None and total + size > self._max_bytes
        too_many = self._max_versions is not None and len(others) + 1 > self._max_versions
        if too_big or too_many:
            used = sum(entry.name in (self._in_use or ()) for entry in others)
            why = f"{used} in use" if self._in_use is not None else _UNKNOWN
            msg = (
                f"no room for {name} ({size} bytes) in {self._dir}: {len(others)} versions with "
                f"{total} bytes stay ({why}, the others pulled last or within "
                f"{self._grace_s:g} s of their last use), and the bounds are {self._bounds()}; "
                "raise them, or unload adapters"
            )
            raise CacheFull(msg)

    def _bounds(self) -> str:
        bounds = []
        if self._max_bytes is not None:
            bounds.append(f"{self._max_bytes} bytes")
        if self._max_versions is not None:
            bounds.append(f"{self._max_versions} versions")
        return " and ".join(bounds)

    def _evict(self, size: int, count: int, keep: str | None) -> list[str]:
        entries = [entry for entry in self.entries() if entry.name != keep]
        total = size + sum(entry.bytes for entry in entries)
        number = count + len(entries)
        gone = []
        for entry in entries:
            fits = self._max_bytes is None or total <= self._max_bytes
            if fits and (self._max_versions is None or number <= self._max_versions):
                break
            if self._remove_unless_used(entry.name):
                gone.append(entry.name)
                total -= entry.bytes
                number -= 1
        return gone

    def _remove_unless_used(self, name: str) -> bool:
        trash = trash_path(name)
        with self._mutex:
            if self._in_use is None or name in self._in_use or name == self._newest:
                return False
            if self._clock() - self._last_used.get(name, self._opened) < self._grace_s:
                return False
            # Out of sight first: a half-deleted one is never taken for a whole one.
            self._store.delete_tree(trash)
            self._store.rename_dir(name, trash)
            self._verified.pop(name, None)
            self._last_used.pop(name, None)
        self._store.delete_tree(trash)
        self.evicted += 1
        return True

    def _read_manifest(self, name: str) -> VersionManifest:
        where = f"{self._dir}/{name}/{MANIFEST}"
        manifest = VersionManifest.from_bytes(self._store.read(f"{name}/{MANIFEST}"), where)
        if manifest.name != name:
            msg = f"{where} is that of version {manifest.name}"
            raise DamagedError(msg)
        return manifest

    def _check(self, name: str) -> VersionManifest:
        """The manifest of an entry all of whose bytes verify."""
        manifest = self._read_manifest(name)
        known = {file.name for file in manifest.files}
        for entry in self._store.list(name):
            if entry.name not in known and entry.name.endswith(_WEIGHT_SUFFIXES):
                msg = f"{self._dir}/{name}/{entry.name} is foreign, and engines would load it"
                raise DamagedError(msg)
        digests = {WEIGHTS_NAME: manifest.adapter_sha256}
        for problem in check_bytes(self._store, name, manifest.files, sha256=digests):
            raise DamagedError(problem.message)
        return manifest

    def _bind(self, root: str) -> None:
        try:
            known = self._store.read(ROOT).decode(errors="replace")
        except ObjectNotFound:
            if self.entries():
                msg = f"{self._dir} holds versions and not the name of their root; take another"
                raise ConfigError(msg) from None
            self._store.put(ROOT, root.encode())
            return
        if known != root:
            msg = f"{self._dir} holds versions of {known}, not of {root}; take another directory"
            raise ConfigError(msg)

    def _remove_remains(self) -> None:
        for entry in self._store.list(""):
            for prefix in (TMP_PREFIX, TRASH_PREFIX):
                if entry.is_dir and entry.name.startswith(prefix):
                    self._store.delete_tree(entry.name)
                    log.info("removed %s/%s, which a stopped process left", self._dir, entry.name)


def _own(directory: Path) -> FileLock:
    """Lock the directory for this process.

    Raises:
        ConfigError: another process has it.
        StorageError: it cannot be made or locked.
    """
    with _disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock.take(directory / LOCK)
    if lock is None:
        msg = f"{directory} is in use by another process; every one needs a cache of its own"
        raise ConfigError(msg)
    return lock


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"cannot use {directory} as a cache: {error}"
        raise StorageError(msg) from error
