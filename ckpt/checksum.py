"""CRC32 of files, whole and per block, from one pass over the bytes; SHA-256 for adapters.

CRC32 is the one of zlib, gzip and S3 (polynomial 0xEDB88320). zlib releases the GIL and runs
at memory speed, so the blocks are computed with it and the whole file's value is *combined*
from theirs: the bytes are not read a second time.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache

from .errors import DamagedError
from .types import BLOCK_BYTES, FileRecord

_POLYNOMIAL = 0xEDB88320
_BITS = 32


def _times(matrix: Sequence[int], vector: int) -> int:
    """Product of a 32 by 32 matrix over GF(2) (columns as integers) and a bit vector."""
    product = 0
    column = 0
    while vector:
        if vector & 1:
            product ^= matrix[column]
        vector >>= 1
        column += 1
    return product


def _square(matrix: Sequence[int]) -> tuple[int, ...]:
    return tuple(_times(matrix, column) for column in matrix)


@lru_cache(maxsize=64)
def _zero_operator(length: int) -> tuple[int, ...]:
    """The linear map that appending ``length`` zero bytes applies to a CRC register.

    One zero *bit* shifts the register right and folds the polynomial in; squaring that map
    doubles the number of bits, so any length takes at most 64 squarings.
    """
    power = (_POLYNOMIAL, *(1 << bit for bit in range(_BITS - 1)))
    for _ in range(3):
        power = _square(power)  # one byte
    result = tuple(1 << bit for bit in range(_BITS))
    while length:
        if length & 1:
            result = tuple(_times(power, column) for column in result)
        power = _square(power)
        length >>= 1
    return result


def crc32_combine(first: int, second: int, second_length: int) -> int:
    """CRC32 of two byte strings put together, from their CRCs and the second one's length."""
    return _times(_zero_operator(second_length), first) ^ second


class Crc32Blocks:
    """Running CRC32 of a stream, per block of ``block`` bytes and as a whole."""

    def __init__(self, block: int = BLOCK_BYTES) -> None:
        self._block = block
        self._done: list[int] = []
        self._done_size = 0
        self._whole = 0
        self._current = 0
        self._filled = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """Take in the next bytes, of any length; a memoryview must have format ``B``."""
        view = memoryview(data)
        position = 0
        while position < len(view):
            take = min(self._block - self._filled, len(view) - position)
            self._current = zlib.crc32(view[position : position + take], self._current)
            self._filled += take
            position += take
            if self._filled == self._block:
                self._whole = crc32_combine(self._whole, self._current, self._block)
                self._done.append(self._current)
                self._done_size += self._block
                self._current = 0
                self._filled = 0

    @property
    def size(self) -> int:
        """Bytes taken in so far."""
        return self._done_size + self._filled

    def record(self, name: str) -> FileRecord:
        """What a manifest says of a file with exactly these bytes."""
        blocks = tuple(self._done)
        whole = self._whole
        if self._filled:
            blocks = (*blocks, self._current)
            whole = crc32_combine(whole, self._current, self._filled)
        return FileRecord(name=name, size=self.size, crc32=whole, block_crc32=blocks)


def file_record(name: str, buffers: Iterable[bytes | bytearray | memoryview]) -> FileRecord:
    """The record of a file whose content is the buffers in order."""
    crc = Crc32Blocks()
    for buffer in buffers:
        crc.update(buffer)
    return crc.record(name)


def block_count(size: int) -> int:
    """Number of CRC blocks of a file (none for an empty one)."""
    return -(-size // BLOCK_BYTES)


def blocks_of(start: int, end: int) -> range:
    """Indices of the blocks that bytes ``[start, end)`` of a file touch."""
    if end <= start:
        return range(0)
    return range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES))


def block_range(record: FileRecord, index: int) -> tuple[int, int]:
    """Bytes ``[start, end)`` that a block covers in its file."""
    start = index * BLOCK_BYTES
    return start, min(start + BLOCK_BYTES, record.size)


def verify_block(
    record: FileRecord, index: int, data: bytes | bytearray | memoryview, where: str
) -> None:
    """Check the bytes of one block.

    Args:
        record: the file, as its manifest describes it.
        index: number of the block.
        data: all bytes of that block.
        where: the file's path, for the message.

    Raises:
        DamagedError: the length or the CRC32 is another one.
    """
    start, end = block_range(record, index)
    if len(data) != end - start:
        msg = f"{where}: block {index} has {len(data)} bytes, the manifest says {end - start}"
        raise DamagedError(msg)
    found = zlib.crc32(data)
    if found != record.block_crc32[index]:
        msg = (
            f"{where}: bytes {start} to {end} are damaged: CRC32 is {found:08x}, "
            f"the manifest says {record.block_crc32[index]:08x}"
        )
        raise DamagedError(msg)


def verify_file(record: FileRecord, data: bytes | bytearray | memoryview, where: str) -> None:
    """Check a whole file, block by block.

    Raises:
        DamagedError: the size or a block's CRC32 is another one; names the damaged bytes.
    """
    view = memoryview(data)
    if len(view) != record.size:
        msg = f"{where}: has {len(view)} bytes, the manifest says {record.size}"
        raise DamagedError(msg)
    for index in range(len(record.block_crc32)):
        start, end = block_range(record, index)
        verify_block(record, index, view[start:end], where)


def sha256_hex(buffers: Iterable[bytes | bytearray | memoryview]) -> str:
    """SHA-256 of the buffers in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    return digest.hexdigest()
