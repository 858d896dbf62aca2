"""Whether a root can keep what a checkpoint promises, found out by trying.

A store may be reachable and still lose a run: one that ignores ``If-None-Match`` lets two trainers
overwrite each other, one without checksums keeps what a bad network card made of a shard. Each
check writes small objects of its own below ``.doctor-…`` and takes them away again.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from .errors import AlreadyExists, CommitUnknown, ConfigError, StorageError, StoreNotExclusive
from .storage import Holding, Storage

if TYPE_CHECKING:  # s3fs is slow to import, and a root on a local disk needs none of it
    from .storage.s3 import S3Storage

PREFIX: Final = ".doctor-"
_RACERS: Final = 8
_ROUNDS: Final = 5
_SMALL: Final = 1024
_CLOCK_S: Final = 5.0
_FREE_BYTES: Final = 1 << 30


class State(StrEnum):
    """How a check ended."""

    ok = "ok"
    warning = "warning"
    failed = "failed"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what was tried, in a word or two.
        state: how it ended. What failed is a promise that cannot be kept on this root.
        found: what was seen.
        means: what follows for steps and versions kept here.
        remedy: what to do about it; None if nothing is to be done.
    """

    name: str
    state: State
    found: str
    means: str
    remedy: str | None = None


def examine(storage: Storage, *, size: int = 16 * 1024 * 1024) -> Iterator[Check]:
    """Try a root out, one check after another; the checks come as they are done.

    Args:
        storage: the root. Nothing that lies there is changed.
        size: bytes of the object with which throughput is measured.

    Yields:
        The outcome of each check. A root that cannot be listed or written ends the examination.

    Raises:
        ConfigError: the root lies behind a service, which is not a store, or a bad ``size``.
        StorageError: what was written cannot be taken away again.
    """
    if isinstance(storage, Holding):
        msg = f"{storage.url} is a service: run `ckpt doctor` on the roots that it serves"
        raise ConfigError(msg)
    if size < 1:
        msg = f"size must be at least 1 byte, got {size}"
        raise ConfigError(msg)
    place = f"{PREFIX}{uuid.uuid4().hex}"
    reading = _listing(storage)
    yield reading
    if reading.state is State.failed:
        return
    try:
        writing = _writing(storage, place)
        yield writing
        if writing.state is State.failed:
            return
        yield from _promises(storage, place)
        yield _latency(storage, place)
        yield _throughput(storage, place, size)
    finally:
        storage.delete_tree(place)
    local = storage.local_path("MANIFEST.json")
    if local is not None:
        yield _space(os.fspath(local.parent))


def _promises(storage: Storage, place: str) -> Iterator[Check]:
    """What two trainers on one root, or one that dies, depend on."""
    from .storage.s3 import S3Storage

    yield _exclusive(storage, place)
    if storage.has_rename:
        yield _rename(storage, place)
    if isinstance(storage, S3Storage):
        yield from _server(storage, place)
        yield _uploads(storage)
    else:
        yield _file_clock(storage, place)


def _listing(storage: Storage) -> Check:
    means = "steps and versions can be found"
    try:
        entries = storage.list("")
    except StorageError as error:
        return Check("list", State.failed, str(error), "nothing can be found here", _PERMISSIONS)
    return Check("list", State.ok, f"{len(entries)} entries at the root", means)


_PERMISSIONS: Final = (
    "check the URL, the credentials, and that they may list, read, write and delete below it"
)


def _writing(storage: Storage, place: str) -> Check:
    """A file is written, read, replaced, listed and deleted, and each is seen at once."""
    path, seen = f"{place}/object", []
    try:
        for content in (os.urandom(_SMALL), os.urandom(_SMALL // 2)):
            storage.put(path, content)
            seen.append(storage.read(path) == content and storage.size(path) == len(content))
        seen.append([entry.name for entry in storage.list(place)] == ["object"])
        storage.delete(path)
        seen.append(not storage.exists(path) and not storage.list(place))
    except StorageError as error:
        return Check("write", State.failed, str(error), "nothing can be saved here", _PERMISSIONS)
    if not all(seen):
        found = "what was written, replaced or deleted was not what was read or listed next"
        means = "a restore may miss the newest step, or read an older file than it should"
        remedy = "use a store that is consistent (no caching proxy or gateway before it)"
        return Check("write", State.failed, found, means, remedy)
    return Check("write", State.ok, "write, read, replace, list, delete", "steps can be saved")


def _exclusive(storage: Storage, place: str) -> Check:
    """Many create one name at once, with different content: one may succeed."""
    path = f"{place}/claim"
    bodies = [os.urandom(_SMALL) for _ in range(_RACERS)]

    def create(body: bytes) -> bool:
        try:
            storage.put_new(path, body)
        except AlreadyExists:
            return False
        return True

    means = "two trainers on this root cannot overwrite each other; a number is given out once"
    try:
        with ThreadPoolExecutor(_RACERS) as pool:
            won = list(pool.map(create, bodies))
        kept = storage.read(path)
    except StoreNotExclusive as error:
        means = "saves and publishes are refused here, so that nothing is lost in silence"
        remedy = "use a store that keeps If-None-Match, or save locally and copy finished versions"
        return Check("exclusive create", State.failed, str(error), means, remedy)
    except CommitUnknown as error:
        means, remedy = "whether a step was committed may stay unknown", "try again"
        return Check("exclusive create", State.failed, str(error), means, remedy)
    except StorageError as error:
        return Check("exclusive create", State.failed, str(error), "no step can be committed")
    winners = [body for body, first in zip(bodies, won, strict=True) if first]
    found = f"{len(winners)} of {_RACERS} who created one name at once succeeded"
    if winners != [kept]:
        means = "two trainers on this root may overwrite each other"
        return Check("exclusive create", State.failed, found, means, "use another store")
    return Check("exclusive create", State.ok, found, means)


def _rename(storage: Storage, place: str) -> Check:
    storage.put(f"{place}/.tmp-step/file", b"1")
    storage.put(f"{place}/.tmp-other/file", b"2")
    means = "a step appears at once, whole"
    try:
        storage.rename_dir(f"{place}/.tmp-step", f"{place}/step")
        try:
            storage.rename_dir(f"{place}/.tmp-other", f"{place}/step")
        except AlreadyExists:
            found = "a directory is renamed in one step, and never over another"
            return Check("rename", State.ok, found, means)
        found = "a directory was renamed over one that was there"
    except StorageError as error:
        found = str(error)
    return Check("rename", State.failed, found, "no step can be committed", "use another disk")


def _server(storage: S3Storage, place: str) -> Iterator[Check]:
    """What only S3 servers have."""
    try:
        facts = storage.ask(f"{place}/facts")
    except StorageError as error:
        yield Check("server", State.failed, str(error), "the server could not be examined")
        return
    name = "exclusive multipart"
    if facts.exclusive_multipart:
        found = f"the server {facts.exclusive_multipart}"
        means = "only objects above 128 MiB would need it, and none of ours is created so"
        yield Check(name, State.warning, found, means)
    else:
        yield Check(name, State.ok, "a second completion is refused", "large creates are safe too")
    if facts.verifies_checksums:
        found, means = (
            "a body with a wrong CRC32 is refused",
            "damage on the way is noticed at once",
        )
        yield Check("checksums", State.ok, found, means)
    else:
        found = "a body with a wrong CRC32 is accepted"
        means = "damage on the way to the server is noticed only when a step is read"
        yield Check("checksums", State.warning, found, means, "run `ckpt verify` after saving")
    yield _clock(facts.clock_ahead_s, f"server {facts.server}" if facts.server else "the server")


def _uploads(storage: S3Storage) -> Check:
    """Uploads that killed processes left behind; they cost, and no listing shows them."""
    try:
        left = storage.pending_uploads()
    except StorageError as error:
        means = "uploads of killed processes cannot be found, and their parts cost money"
        return Check("uploads", State.warning, str(error), means, "allow ListMultipartUploads")
    if left:
        found = f"{len(left)} unfinished uploads"
        means = "their parts cost money and show in no listing"
        return Check("uploads", State.warning, found, means, "`ckpt prune URL --uploads`")
    return Check("uploads", State.ok, "no unfinished uploads", "nothing is paid for in vain")


def _file_clock(storage: Storage, place: str) -> Check:
    storage.put(f"{place}/clock", b"1")
    local = storage.local_path(f"{place}/clock")
    if local is None:
        return _clock(None, "the store")
    written = datetime.fromtimestamp(local.stat().st_mtime, UTC)
    return _clock((written - datetime.now(UTC)).total_seconds(), "the file system")


def _clock(ahead_s: float | None, whose: str) -> Check:
    means = "leases and ages of uploads are judged alike everywhere"
    if ahead_s is None:
        found = f"{whose} does not tell its time"
        return Check("clock", State.ok, found, "only this machine's clock counts")
    if abs(ahead_s) > _CLOCK_S:
        found = f"{whose} is {abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} us"
        means = "leases may seem to end early or late; steps do not depend on clocks"
        return Check("clock", State.warning, found, means, "synchronise this machine (NTP)")
    return Check("clock", State.ok, f"{whose} is within {_CLOCK_S:.0f} s of us", means)


def _latency(storage: Storage, place: str) -> Check:
    body = os.urandom(_SMALL)
    put = _median_ms(lambda i: storage.put(f"{place}/small-{i}", body))
    get = _median_ms(lambda i: storage.read(f"{place}/small-{i}"))
    found = f"{_SMALL} bytes: written in {put:.1f} ms, read in {get:.1f} ms (medians)"
    means = f"committing a step takes some {4 * put:.0f} ms beside the upload of its bytes"
    return Check("latency", State.ok, found, means)


def _throughput(storage: Storage, place: str, size: int) -> Check:
    body = os.urandom(size)
    path = f"{place}/large"
    began = time.perf_counter()
    storage.put(path, body)
    wrote = time.perf_counter()
    same = storage.read(path) == body
    read = time.perf_counter()
    up, down = (size / max(s, 1e-9) / 1e6 for s in (wrote - began, read - wrote))
    found = f"{size / 1e6:.1f} MB: written at {up:.0f} MB/s, read at {down:.0f} MB/s"
    if not same:
        return Check("throughput", State.failed, "what was read is not what was written", "damage")
    return Check("throughput", State.ok, found, f"an adapter of 81 MB takes {81 / up:.1f} s")


def _median_ms(once: Callable[[int], object]) -> float:
    spent = []
    for i in range(_ROUNDS):
        began = time.perf_counter()
        once(i)
        spent.append((time.perf_counter() - began) * 1e3)
    return statistics.median(spent)


def _space(directory: str) -> Check:
    free = shutil.disk_usage(directory).free
    found = f"{free / 1e9:.1f} GB free"
    if free < _FREE_BYTES:
        means = "a full disk fails a save, and harms no step that is there"
        return Check("space", State.warning, found, means, "`ckpt prune`, or a larger disk")
    return Check("space", State.ok, found, "saves have room")
