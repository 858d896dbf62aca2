"""Bring a version to this machine: every byte verified, and the directory appears at once.

What is brought is a plain PEFT directory with the version's manifest beside the two files, so that
it can be verified later without the root it came from. A *copy* is durable and its bytes are its
own. One that is *placed*, in a cache, is neither: it is verified anew before an owner of the cache
first uses it, and where the root lies on the same file system, its weights are a hard link to the
root's, which nobody ever changes.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from ckpt.catalog import check_bytes
from ckpt.checksum import block_range, verify_block
from ckpt.errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    ObjectNotFound,
    StorageError,
)
from ckpt.layout import ADAPTERS, MANIFEST, TMP_PREFIX, new_attempt
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, local_directory
from ckpt.storage import Storage
from ckpt.storage.checked import read_verified
from ckpt.storage.exchange import exchange_dirs
from ckpt.storage.posix import PosixStorage
from ckpt.types import FileRecord

RUN_BLOCKS: Final = 2
"""Blocks in one read: 16 MiB, few requests for an object store, which splits them as it likes."""
READS_AHEAD: Final = 4
"""Reads under way; as many are in memory, and one more."""

_FILES: Final = frozenset({CONFIG_NAME, WEIGHTS_NAME, MANIFEST})

_NO_LINK: Final = frozenset(
    {
        errno.EXDEV,
        errno.EPERM,
        errno.EACCES,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
        errno.ENOSYS,
        errno.EMLINK,
    }
)
"""Other file systems, file systems without links, and a system that links only one's own files."""

log = logging.getLogger(__name__)


def pull_version(
    storage: Storage, manifest: VersionManifest, into: str | PathLike[str], *, place: bool = False
) -> Path:
    """Bring a version into a local directory, under its own name.

    Args:
        storage: the root.
        manifest: the version's verified manifest.
        into: the directory that gets it; made if it is missing. While the copy is under way,
            and after a kill, it lies in ``.tmp-<name>-<attempt>`` there, which may be deleted.
        place: as a cache wants it: not synced, and linked rather than copied where that can be.

    Returns:
        ``<into>/<name>``: there already and verified, or complete (a copy: and durable) when it
        appears.

    Raises:
        ConfigError: ``into`` is a file, or a URL of another store.
        NoCheckpoint: the version was deleted meanwhile.
        DamagedError: its bytes do not verify.
        AlreadyExists: something at the target that is no version.
        StorageError: one of the two stores failed.
    """
    parent = local_directory(fspath(into))
    if parent is None:
        raise ConfigError(f"versions are fetched to a directory of this machine, got {into!r}")
    local = PosixStorage(parent, durable=not place)
    target = parent / manifest.name
    problem = _problem(local, manifest)
    if problem is None:
        return target
    existing = bool(problem)
    if existing:
        log.warning("fetching version %s again: %s", manifest.name, problem)
    work = f"{TMP_PREFIX}{manifest.name}-{new_attempt()}"
    try:
        _bring(storage, manifest, local, work, link=place)
        if existing:
            exchange_dirs(parent / work, target)
        else:
            local.rename_dir(work, manifest.name)
    except AlreadyExists:
        # Another process fetched it at the same time; theirs is as good if it verifies.
        if _problem(local, manifest) is not None:
            raise
    finally:
        # After a rename nothing is left under this name; after an exchange, the damaged one.
        local.delete_tree(work)
    return target


def _problem(local: Storage, manifest: VersionManifest) -> str | None:
    """What is wrong with the copy that is there; empty if there is none, None if it verifies.

    Raises:
        AlreadyExists: what is there is no copy of a version.
    """
    name = manifest.name
    path = local.local_path(name)
    if path is None or not path.exists():
        return ""
    if not path.is_dir():
        raise AlreadyExists(f"{path} is a file; want room for a version's directory")
    foreign = [item.name for item in local.list(name) if item.is_dir or item.name not in _FILES]
    if foreign:
        raise AlreadyExists(f"{path} is not replaced: {foreign[0]!r} in it is no part of a version")
    try:
        if local.read(f"{name}/{MANIFEST}") != manifest.to_bytes():
            return f"{path}/{MANIFEST} is another one"
    except ObjectNotFound as error:
        return str(error)
    digests = {WEIGHTS_NAME: manifest.adapter_sha256}
    found = next(check_bytes(local, name, manifest.files, sha256=digests), None)
    return None if found is None else found.message


def _bring(
    storage: Storage, manifest: VersionManifest, local: PosixStorage, work: str, *, link: bool
) -> None:
    """Weights, manifest, config: a watcher that waits for the config finds all the rest."""
    files = {file.name: file for file in manifest.files}
    weights = files[WEIGHTS_NAME]
    if not (link and _linked(storage, manifest, local.url, work)):
        local.put_stream(f"{work}/{WEIGHTS_NAME}", _runs(storage, manifest, weights), weights.size)
    local.put(f"{work}/{MANIFEST}", manifest.to_bytes())
    config = [bytes(run) for run in _runs(storage, manifest, files[CONFIG_NAME])]
    local.put(f"{work}/{CONFIG_NAME}", b"".join(config))


def _linked(storage: Storage, manifest: VersionManifest, parent: str, work: str) -> bool:
    """Make the weights a hard link to the root's and verify it; False where that cannot be.

    Whoever deletes the version at the root takes nothing from the link. What is read here is what
    engines will read.

    Raises:
        DamagedError: another SHA-256.
        NoCheckpoint: the version was deleted meanwhile.
    """
    source = storage.local_path(f"{_path(manifest)}/{WEIGHTS_NAME}")
    if source is None:
        return False
    link = Path(parent, work, WEIGHTS_NAME)
    try:
        link.parent.mkdir(parents=True)
        os.link(source, link, follow_symlinks=False)
        with link.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise _missing(storage, manifest, error) from error
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise StorageError(f"{link}: cannot be linked to {source}: {error.strerror}") from error
    _compare(found, manifest, f"{storage.url}/{_path(manifest)}")
    return True


def _runs(storage: Storage, manifest: VersionManifest, record: FileRecord) -> Iterator[memoryview]:
    """A file's verified bytes in order; the next are read, and these summed up, meanwhile.

    The digest of the weights is compared before their last bytes are given out.
    """
    digest = hashlib.sha256()
    pending: deque[Future[memoryview]] = deque()
    blocks = len(record.block_crc32)
    runs = [range(low, min(low + RUN_BLOCKS, blocks)) for low in range(0, blocks, RUN_BLOCKS)]
    with (
        ThreadPoolExecutor(READS_AHEAD, thread_name_prefix="ckpt-pull") as readers,
        ThreadPoolExecutor(1, thread_name_prefix="ckpt-digest") as summing,
    ):
        summed: Future[None] | None = None
        asked = 0
        for given in range(len(runs)):
            for run in runs[asked : given + READS_AHEAD]:
                pending.append(readers.submit(_read_run, storage, manifest, record, run))
                asked += 1
            data = pending.popleft().result()
            if record.name == WEIGHTS_NAME:
                if summed is not None:
                    summed.result()  # one at a time, so that memory stays bounded
                summed = summing.submit(digest.update, data)
                if given == len(runs) - 1:
                    summed.result()
                    _compare(digest.hexdigest(), manifest, f"{storage.url}/{_path(manifest)}")
            yield data


def _read_run(
    storage: Storage, manifest: VersionManifest, record: FileRecord, run: range
) -> memoryview:
    start, end = block_range(record, run.start)[0], block_range(record, run.stop - 1)[1]
    target = memoryview(bytearray(end - start))
    path = f"{_path(manifest)}/{record.name}"

    def verify() -> None:
        for block in run:
            low, high = block_range(record, block)
            data = target[low - start : high - start]
            verify_block(record, block, data, f"{storage.url}/{path}")

    try:
        read_verified(storage, path, start, target, verify)
    except ObjectNotFound as error:
        raise _missing(storage, manifest, error) from error
    return target


def _missing(storage: Storage, manifest: VersionManifest, error: Exception) -> CkptError:
    """What a file that is not there says of its version."""
    # Who deletes a version takes its manifest away first.
    if storage.exists(f"{_path(manifest)}/{MANIFEST}"):
        return DamagedError(f"version {manifest.name} is damaged: {error}")
    msg = f"version {manifest.name} of {storage.url} was deleted while it was copied"
    return NoCheckpoint(f"{msg}; take a lease first")


def _path(manifest: VersionManifest) -> str:
    return f"{ADAPTERS}/{manifest.name}"


def _compare(found: str, manifest: VersionManifest, where: str) -> None:
    if found != manifest.adapter_sha256:
        msg = f"{where}/{WEIGHTS_NAME}: SHA-256 is {found}, the manifest says "
        raise DamagedError(msg + manifest.adapter_sha256)
