"""Writing and reading with checksums, over any store."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ckpt.checksum import block_range, blocks_of, file_record, verify_block
from ckpt.errors import DamagedError
from ckpt.types import FileRecord

from .base import Buffer, Storage
from .paths import as_views

log = logging.getLogger(__name__)

_INLINE_BYTES = 1024 * 1024
"""Below this a thread costs more than the checksum."""


def put_checked(
    storage: Storage, path: str, data: Buffer | Sequence[Buffer], *, name: str
) -> FileRecord:
    """Write a file and compute its record from the same buffers, at the same time.

    The checksum runs in a thread beside the write: both leave the interpreter free, and neither
    waits for the other.

    Args:
        storage: where to.
        path: path below the store's root.
        data: content, as for :meth:`Storage.put`; must not change until this returns.
        name: the file's name in the record, relative to the step's or version's directory.

    Raises:
        StorageError: what the store says.
    """
    views = as_views(data)
    if sum(len(view) for view in views) < _INLINE_BYTES:
        record = file_record(name, views)
        storage.put(path, views)
        return record
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ckpt-crc") as pool:
        pending = pool.submit(file_record, name, views)
        storage.put(path, views)
        return pending.result()


def read_verified(
    storage: Storage, path: str, start: int, target: memoryview, verify: Callable[[], None]
) -> None:
    """Fill ``target`` with a file's bytes from ``start`` on, and verify them.

    What comes over a network and does not verify is read once more: a bit may have flipped on the
    way, and a step must not count as damaged for that.

    Args:
        storage: where from.
        path: path below the store's root.
        start: first byte.
        target: memory to fill.
        verify: looks at ``target``; raises :class:`DamagedError`.

    Raises:
        StorageError: the store cannot give the bytes.
        DamagedError: they do not verify, twice.
    """
    storage.read_into(path, start, target)
    try:
        verify()
    except DamagedError as error:
        if storage.local_path(path) is not None:
            raise
        log.warning("%s; reading it again, in case that happened on the way", error)
        storage.read_into(path, start, target)
        verify()


def read_checked(
    storage: Storage, path: str, record: FileRecord, start: int = 0, end: int | None = None
) -> bytes:
    """Bytes ``[start, end)`` of a file whose blocks verify; reads whole blocks around them.

    Raises:
        StorageError: the store cannot give them.
        DamagedError: a block's CRC32 is not the record's, or the range leaves the file.
    """
    end = record.size if end is None else end
    where = f"{storage.url}/{path}"
    if not 0 <= start <= end <= record.size:
        msg = f"{where}: bytes {start} to {end} are not in a file of {record.size} bytes"
        raise DamagedError(msg)
    blocks = blocks_of(start, end)
    if not blocks:
        return b""
    first, last = block_range(record, blocks[0])[0], block_range(record, blocks[-1])[1]
    data = memoryview(bytearray(last - first))

    def verify() -> None:
        for index in blocks:
            low, high = block_range(record, index)
            verify_block(record, index, data[low - first : high - first], where)

    read_verified(storage, path, first, data, verify)
    return bytes(data[start - first : end - first])


def verified_blocks(storage: Storage, path: str, record: FileRecord) -> Iterator[bytes]:
    """A file's content, block by block, each one only after its CRC32 was checked.

    Raises:
        StorageError: the store cannot give a block.
        DamagedError: a block's CRC32 is not the record's.
    """
    for index in range(len(record.block_crc32)):
        data = storage.read(path, *block_range(record, index))
        verify_block(record, index, data, f"{storage.url}/{path}")
        yield data
