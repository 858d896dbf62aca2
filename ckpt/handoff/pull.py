"""Copy a version to this machine: every byte verified, and the directory appears at once.

The copy is a plain PEFT directory with the version's manifest beside the two files, so that it can
be verified later without the root it came from.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike, fspath
from pathlib import Path
from typing import Final

from ckpt.catalog import check_bytes
from ckpt.checksum import block_range, verify_block
from ckpt.errors import AlreadyExists, ConfigError, DamagedError, NoCheckpoint, ObjectNotFound
from ckpt.layout import ADAPTERS, MANIFEST, TMP_PREFIX, new_attempt
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME, local_directory
from ckpt.storage import Storage, open_storage
from ckpt.storage.checked import read_verified
from ckpt.storage.exchange import exchange_dirs
from ckpt.types import FileRecord

RUN_BLOCKS: Final = 4
"""Blocks in one read: 32 MiB, few requests for an object store, which splits them as it likes."""
READS_AHEAD: Final = 2
"""Reads under way; as many are in memory, and one more."""

_FILES: Final = frozenset({CONFIG_NAME, WEIGHTS_NAME, MANIFEST})

log = logging.getLogger(__name__)


def pull_version(storage: Storage, manifest: VersionManifest, into: str | PathLike[str]) -> Path:
    """Copy a version into a local directory, under its own name.

    Args:
        storage: the root.
        manifest: the version's verified manifest.
        into: the directory that gets it; made if it is missing. While the copy is under way,
            and after a kill, it lies in ``.tmp-<name>-<attempt>`` there, which may be deleted.

    Returns:
        ``<into>/<name>``: there already and verified, or complete and durable when it appears.

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
    local = open_storage(parent)
    target = parent / manifest.name
    problem = _problem(local, manifest)
    if problem is None:
        return target
    existing = bool(problem)
    if existing:
        log.warning("fetching version %s again: %s", manifest.name, problem)
    work = f"{TMP_PREFIX}{manifest.name}-{new_attempt()}"
    try:
        _copy(storage, manifest, local, work)
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


def _copy(storage: Storage, manifest: VersionManifest, local: Storage, work: str) -> None:
    """Weights, manifest, config: a watcher that waits for the config finds all the rest."""
    files = {file.name: file for file in manifest.files}
    weights = files[WEIGHTS_NAME]
    local.put_stream(f"{work}/{WEIGHTS_NAME}", _runs(storage, manifest, weights), weights.size)
    local.put(f"{work}/{MANIFEST}", manifest.to_bytes())
    config = [bytes(run) for run in _runs(storage, manifest, files[CONFIG_NAME])]
    local.put(f"{work}/{CONFIG_NAME}", b"".join(config))


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
        # Who deletes a version takes its manifest away first.
        if storage.exists(f"{_path(manifest)}/{MANIFEST}"):
            raise DamagedError(f"version {manifest.name} is damaged: {error}") from error
        msg = f"version {manifest.name} of {storage.url} was deleted while it was copied"
        raise NoCheckpoint(f"{msg}; take a lease first") from error
    return target


def _path(manifest: VersionManifest) -> str:
    return f"{ADAPTERS}/{manifest.name}"


def _compare(found: str, manifest: VersionManifest, where: str) -> None:
    if found != manifest.adapter_sha256:
        msg = f"{where}/{WEIGHTS_NAME}: SHA-256 is {found}, the manifest says "
        raise DamagedError(msg + manifest.adapter_sha256)
