"""A PEFT directory on any store, of which byte ranges are read and nothing else.

The configuration and the header of the weights say all that has to be checked before a byte of a
tensor is read. Where a version's manifest lies beside them, every byte that is handed out comes
from a block whose CRC32 matched; a bare directory carries no checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from .checksum import block_range, blocks_of
from .errors import DamagedError, ObjectNotFound, StateError
from .layout import ADAPTERS, MANIFEST
from .manifest import VersionManifest
from .peft import CONFIG_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME
from .peft_config import plain_key
from .shard import LENGTH_BYTES, HeaderTensor, header_size, parse_header
from .storage import Storage, read_checked
from .types import BLOCK_BYTES, FileRecord

READ_THREADS: Final = 8
RUN_BYTES: Final = 4 * BLOCK_BYTES
"""Longest single read: a request large enough for an object store."""
GAP_BYTES: Final = 1024 * 1024
"""Ranges nearer to each other than this are read at once: a request costs more than the bytes."""
_HEAD_BYTES: Final = 64 * 1024
"""Read at first of a file whose header may be longer or shorter."""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter whose configuration and header were read.

    Attributes:
        storage: the directory.
        config: content of ``adapter_config.json``.
        keys: PEFT key to the key as it stands in the file (with an adapter's name in it, maybe).
        tensors: PEFT key to its place in the weights file.
        manifest: the version's manifest, or None for a bare directory.
        digest: SHA-256 over the configuration, the header and the manifest.
    """

    storage: Storage
    config: Mapping[str, Any]
    keys: Mapping[str, str]
    tensors: Mapping[str, HeaderTensor]
    manifest: VersionManifest | None
    digest: str

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        """Byte ranges ``[start, end)`` of the weights file, in parallel, in their order.

        Raises:
            DamagedError: a block that does not verify.
            StorageError: the store failed, or the file became shorter.
        """
        record = _record(self.manifest, WEIGHTS_NAME)
        parts = [memoryview(bytearray(end - start)) for start, end in ranges]

        def run(low: int, high: int) -> None:
            data = _read(self.storage, WEIGHTS_NAME, low, high, record)
            for (start, end), part in zip(ranges, parts, strict=True):
                first, last = max(start, low), min(end, high)
                if first < last:
                    part[first - start : last - start] = data[first - low : last - low]

        with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="ckpt-read") as pool:
            jobs = [pool.submit(run, *pair) for pair in _runs(ranges, record)]
            for job in jobs:
                job.result()
        return parts


def open_adapter(storage: Storage) -> AdapterFile:
    """Read an adapter's configuration and header.

    Args:
        storage: the PEFT directory.

    Raises:
        ObjectNotFound: one of the two files is missing; says what lies there instead.
        DamagedError: a file that does not parse or does not verify.
        StateError: the file holds several adapters.
        StorageError: the store failed.
    """
    manifest = None
    if storage.exists(MANIFEST):
        where = f"{storage.url}/{MANIFEST}"
        manifest = VersionManifest.from_bytes(storage.read(MANIFEST), where)
    text = _whole(storage, CONFIG_NAME, manifest)
    header, size = _header(storage, manifest)
    where = f"{storage.url}/{WEIGHTS_NAME}"
    keys: dict[str, str] = {}
    tensors: dict[str, HeaderTensor] = {}
    for name, entry in parse_header(header, size, where).items():
        key = plain_key(name)
        if key in keys:
            msg = f"{where} holds several adapters: {key!r} occurs more than once"
            raise StateError(msg)
        keys[key], tensors[key] = name, entry
    said = hashlib.sha256()
    for part in (text, header, b"" if manifest is None else manifest.to_bytes()):
        said.update(len(part).to_bytes(8, "little"))
        said.update(part)
    return AdapterFile(storage, _config(text, storage), keys, tensors, manifest, said.hexdigest())


def _config(text: bytes, storage: Storage) -> Mapping[str, Any]:
    where = f"{storage.url}/{CONFIG_NAME}"
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{where} is not JSON: {str(error)[:200]}") from error
    if not isinstance(config, dict):
        msg = f"{where} must hold a JSON object, got {type(config).__name__}"
        raise DamagedError(msg)
    return config


def _whole(storage: Storage, name: str, manifest: VersionManifest | None) -> bytes:
    record = _record(manifest, name)
    try:
        return storage.read(name) if record is None else read_checked(storage, name, record)
    except ObjectNotFound as error:
        raise ObjectNotFound(_absent(storage, name)) from error


def _header(storage: Storage, manifest: VersionManifest | None) -> tuple[bytes, int]:
    """The first bytes of the weights file, header included, and its size."""
    where = f"{storage.url}/{WEIGHTS_NAME}"
    record = _record(manifest, WEIGHTS_NAME)
    try:
        size = storage.size(WEIGHTS_NAME)
    except ObjectNotFound as error:
        raise ObjectNotFound(_absent(storage, WEIGHTS_NAME)) from error
    if record is not None and record.size != size:
        msg = f"{where} has {size} bytes, the manifest says {record.size}"
        raise DamagedError(msg)
    head = _read(storage, WEIGHTS_NAME, 0, min(size, _HEAD_BYTES), record)
    end = header_size(bytes(head[:LENGTH_BYTES]), size, where)
    if end > len(head):
        head = _read(storage, WEIGHTS_NAME, 0, end, record)
    return bytes(head[:end]), size


def _absent(storage: Storage, name: str) -> str:
    there = [entry.name for entry in storage.list("")]
    if name == WEIGHTS_NAME and LEGACY_WEIGHTS_NAME in there:
        return (
            f"{storage.url} has only the legacy {LEGACY_WEIGHTS_NAME}, a pickle of which no part "
            "can be read; load and save it once with PEFT, which writes safetensors"
        )
    if ADAPTERS in there:
        return f"{storage.url} is the root of a run; its versions are directories in {ADAPTERS}/"
    found = f"it holds {', '.join(there[:8])}" if there else "it holds nothing"
    return (
        f"no {name} in {storage.url}: want a PEFT directory with {WEIGHTS_NAME} and "
        f"{CONFIG_NAME}, but {found}"
    )


def _record(manifest: VersionManifest | None, name: str) -> FileRecord | None:
    files = () if manifest is None else manifest.files
    return next((record for record in files if record.name == name), None)


def _runs(ranges: Sequence[tuple[int, int]], record: FileRecord | None) -> list[tuple[int, int]]:
    """What is read at once: whole blocks where there are checksums, else near neighbours."""
    spans = sorted((start, end) for start, end in ranges if start < end)
    if record is not None:
        blocks = sorted({block for span in spans for block in blocks_of(*span)})
        spans = [block_range(record, block) for block in blocks]
    merged: list[tuple[int, int]] = []
    gap = 0 if record is not None else GAP_BYTES
    for start, end in spans:
        if merged and start <= merged[-1][1] + gap and end - merged[-1][0] <= RUN_BYTES:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    if record is not None:
        return merged
    return [
        (at, min(at + RUN_BYTES, end))
        for start, end in merged
        for at in range(start, end, RUN_BYTES)
    ]


def _read(
    storage: Storage, name: str, low: int, high: int, record: FileRecord | None
) -> memoryview:
    """Bytes ``[low, high)`` of a file; verified, by whole blocks, where its record is known."""
    where = f"{storage.url}/{name}"
    if record is None:
        data = memoryview(bytearray(high - low))
        storage.read_into(name, low, data)
        return data
    if high > record.size:
        msg = f"{where}: the manifest knows only {record.size} bytes of it"
        raise DamagedError(msg)
    return memoryview(read_checked(storage, name, record, low, high))
