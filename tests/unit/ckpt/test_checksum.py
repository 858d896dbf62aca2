"""CRC32 per block and whole, from one pass."""

from __future__ import annotations

import hashlib
import os
import zlib

import pytest

from ckpt import checksum
from ckpt.errors import DamagedError
from ckpt.types import BLOCK_BYTES, FileRecord


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 300])
@pytest.mark.parametrize("piece", [1, 7, 100, 1000])
def test_blocks_and_whole_equal_zlib(size: int, piece: int) -> None:
    data = os.urandom(size)
    crc = checksum.Crc32Blocks(block=100)
    for start in range(0, size, piece):
        crc.update(data[start : start + piece])
    record = crc.record("x")
    assert record == FileRecord(
        name="x",
        size=size,
        crc32=zlib.crc32(data),
        block_crc32=tuple(zlib.crc32(data[s : s + 100]) for s in range(0, size, 100)),
    )
    assert crc.size == size


def test_a_record_may_be_taken_in_between() -> None:
    crc = checksum.Crc32Blocks(block=4)
    crc.update(b"abcdef")
    first = crc.record("x")
    crc.update(b"gh")
    assert first.crc32 == zlib.crc32(b"abcdef")
    assert crc.record("x").crc32 == zlib.crc32(b"abcdefgh")


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 8 * 2**20, 5 * 2**30 + 3])
def test_combine_needs_no_bytes(length: int) -> None:
    first = zlib.crc32(b"first part")
    small = length if length < 2**24 else 0
    if small == length:
        second = bytes(length)
        assert checksum.crc32_combine(first, zlib.crc32(second), length) == zlib.crc32(
            b"first part" + second
        )
    # Associative: (a + b) + c == a + (b + c), also for lengths that no test can hold.
    b, c = 0x12345678, 0x9ABCDEF0
    left = checksum.crc32_combine(checksum.crc32_combine(first, b, length), c, 1000)
    right = checksum.crc32_combine(first, checksum.crc32_combine(b, c, 1000), length + 1000)
    assert left == right


def test_files_across_the_block_border() -> None:
    data = bytes(BLOCK_BYTES) + b"tail"
    record = checksum.file_record("x", [data[:5], data[5:]])
    assert record.crc32 == zlib.crc32(data)
    assert record.block_crc32 == (zlib.crc32(data[:BLOCK_BYTES]), zlib.crc32(b"tail"))
    assert checksum.block_range(record, 1) == (BLOCK_BYTES, BLOCK_BYTES + 4)
    checksum.verify_file(record, data, "x")
    damaged = bytearray(data)
    damaged[-1] ^= 1
    with pytest.raises(DamagedError, match=rf"f/x: bytes {BLOCK_BYTES} to {BLOCK_BYTES + 4} are"):
        checksum.verify_file(record, damaged, "f/x")
    with pytest.raises(DamagedError, match="the manifest says"):
        checksum.verify_file(record, data[:-1], "x")


def test_a_block_of_another_length_is_damaged() -> None:
    record = checksum.file_record("x", [b"abc"])
    with pytest.raises(DamagedError, match="block 0 has 2 bytes, the manifest says 3"):
        checksum.verify_block(record, 0, b"ab", "x")


def test_every_flipped_bit_of_a_block_is_found() -> None:
    data = b"some bytes of a tensor"
    record = checksum.file_record("x", [data])
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match="CRC32 is"):
            checksum.verify_block(record, 0, damaged, "x")


@pytest.mark.parametrize(
    ("start", "end", "blocks"),
    [
        (0, 0, []),
        (5, 5, []),
        (0, 1, [0]),
        (0, BLOCK_BYTES, [0]),
        (BLOCK_BYTES - 1, BLOCK_BYTES + 1, [0, 1]),
        (BLOCK_BYTES, 3 * BLOCK_BYTES, [1, 2]),
    ],
)
def test_blocks_that_a_range_touches(start: int, end: int, blocks: list[int]) -> None:
    assert list(checksum.blocks_of(start, end)) == blocks


def test_block_count() -> None:
    assert [checksum.block_count(n) for n in (0, 1, BLOCK_BYTES, BLOCK_BYTES + 1)] == [0, 1, 1, 2]


def test_sha256() -> None:
    assert checksum.sha256_hex([b"ab", b"c"]) == hashlib.sha256(b"abc").hexdigest()
