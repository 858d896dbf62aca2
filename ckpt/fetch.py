"""Read exactly the bytes that a rank needs of a step, verified, into staging tensors.

Nothing live is touched here. Every block of 8 MiB that holds a needed byte is read once and its
CRC32 is checked; reading is parallel over blocks. Where most of a stretch of blocks is needed, it
is read into one piece of memory and the values are views of that; elsewhere the needed bytes are
copied out of a bounded buffer.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from .checksum import block_range, blocks_of, verify_block
from .dtypes import TORCH_DTYPES
from .errors import DamagedError
from .manifest import StepManifest
from .plan import Piece, read_items
from .storage import Storage
from .storage.checked import read_verified
from .types import BLOCK_BYTES, Chunk, FileRecord, TensorRecord

READ_THREADS = 8
DENSE = 0.75
"""From this needed share of a stretch of blocks on, the whole stretch stays in memory: so a restore
never holds more than a third above what it needs."""
RUN_BLOCKS = 4
"""Blocks in one read: requests large enough for an object store, buffers of at most 32 MiB."""


@dataclass(slots=True)
class _Range:
    """Bytes ``[start, end)`` of a file and the memory they go to; None if they are only checked."""

    start: int
    end: int
    target: memoryview | None


@dataclass(slots=True)
class _Direct:
    """A piece that is one run of bytes of a file, so that its value may be a view of what is read.

    Attributes:
        index: its place in the list of pieces.
        piece: the piece.
        start: first byte in the file.
        end: one past the last byte.
    """

    index: int
    piece: Piece
    start: int
    end: int


@dataclass(slots=True)
class _Region:
    """A box that is not one run of bytes: read whole rows, then cut the box out of them."""

    rows: torch.Tensor
    box: tuple[slice, ...]
    target: torch.Tensor


@dataclass(slots=True)
class _Work:
    ranges: dict[str, list[_Range]] = field(default_factory=dict)
    direct: dict[str, list[_Direct]] = field(default_factory=dict)
    regions: list[_Region] = field(default_factory=list)
    spare: list[memoryview] = field(default_factory=list)

    def memory(self, size: int) -> memoryview:
        """Memory that is aligned for every dtype: spare one, else fresh one."""
        for index, memory in enumerate(self.spare):
            if len(memory) >= size:
                self.spare[index] = memory[size + -size % 64 :]
                return memory[:size]
        return _memory(size)


def fetch(
    storage: Storage,
    directory: str,
    manifest: StepManifest,
    pieces: Sequence[Piece],
    *,
    rank: int,
    world: int,
    present: Collection[str] | None = None,
    spare: Sequence[memoryview] = (),
) -> dict[str, torch.Tensor]:
    """The pieces' values as new CPU tensors, by name (one piece of a tensor at most).

    Args:
        storage: the root.
        directory: the step's directory.
        manifest: its verified manifest.
        pieces: what this rank needs; names, shapes and dtypes are those of the manifest.
        rank: this rank; the ranks share the check of the bytes that no tensor owns.
        world: number of ranks.
        present: the files that lie here, if some lie on other nodes; each rank then checks the
            headers of all of these itself.
        spare: writable memory, aligned to 64 bytes, which values may be views of.

    Raises:
        DamagedError: bytes that do not verify, or a file that is too short or missing.
        StorageError: the store failed.
    """
    values = fetch_pieces(
        storage, directory, manifest, pieces, share=(rank, world), present=present, spare=spare
    )
    return {piece.name: value for piece, value in zip(pieces, values, strict=True)}


def fetch_pieces(
    storage: Storage,
    directory: str,
    manifest: StepManifest,
    pieces: Sequence[Piece],
    *,
    share: tuple[int, int] | None,
    present: Collection[str] | None = None,
    spare: Sequence[memoryview] = (),
) -> list[torch.Tensor]:
    """As :func:`fetch`, in the order of the pieces; several may be of one tensor.

    ``share`` says which part (number, of how many) of the shards' headers is verified as well.
    """
    records = {record.name: record for record in manifest.tensors}
    work = _Work(spare=list(spare))
    values: dict[int, torch.Tensor] = {}
    for index, piece in enumerate(pieces):
        value = _stage(index, records[piece.name], piece, work)
        if value is not None:
            values[index] = value
    files = {record.name: record for record in manifest.files}
    if share is not None:
        _add_headers(work, manifest, *share, present)
    runs = [
        run
        for name in sorted(work.ranges.keys() | work.direct.keys())
        for run in _plan_file(files[name], work, values)
    ]
    # Threads beyond the processors help where an answer is waited for, not on a local disk.
    local = storage.local_path(directory) is not None
    threads = min(READ_THREADS, os.cpu_count() or 1) if local else READ_THREADS
    with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-read") as pool:
        jobs = [pool.submit(_read_run, storage, directory, run) for run in runs]
        for job in jobs:
            job.result()
    for region in work.regions:
        region.target.copy_(region.rows[region.box])
    return [values[index] for index in range(len(pieces))]


def _stage(index: int, record: TensorRecord, piece: Piece, work: _Work) -> torch.Tensor | None:
    """An uninitialised tensor for a piece, with the reads that fill it noted in ``work``.

    None if the piece is noted there as one that needs no memory of its own.
    """
    dtype = TORCH_DTYPES[record.dtype]
    if piece.empty:
        return torch.empty(piece.sizes, dtype=dtype)
    for chunk in record.chunks:
        if (chunk.offsets, chunk.sizes) == (piece.offsets, piece.sizes):
            direct = _Direct(index, piece, chunk.start, chunk.end)
            work.direct.setdefault(chunk.file, []).append(direct)
            return None
    memory = bytearray(math.prod(piece.sizes) * dtype.itemsize)
    value = torch.frombuffer(memory, dtype=dtype).view(piece.sizes)
    for chunk, item in read_items(record, piece):
        source, target = tuple(item.storage_offsets), tuple(item.dest_offsets)
        sizes = tuple(item.lengths)
        # Whole rows of dimension 0 on both sides are one run of bytes on both sides.
        whole = sizes[1:] == chunk.sizes[1:] and sizes[1:] == piece.sizes[1:]
        row_bytes = math.prod(chunk.sizes[1:]) * dtype.itemsize
        first = source[0] if source else 0
        count = sizes[0] if sizes else 1
        start = chunk.start + first * row_bytes
        end = start + count * row_bytes
        if whole:
            at = (target[0] if target else 0) * row_bytes
            view = memoryview(memory)[at : at + (end - start)]
        else:
            view = memoryview(bytearray(end - start))
            rows = torch.frombuffer(view, dtype=dtype).view(count, *chunk.sizes[1:])
            box = (
                slice(None),
                *(slice(o, o + n) for o, n in zip(source[1:], sizes[1:], strict=True)),
            )
            place = tuple(slice(o, o + n) for o, n in zip(target, sizes, strict=True))
            work.regions.append(_Region(rows, box, value[place]))
        work.ranges.setdefault(chunk.file, []).append(_Range(start, end, view))
    return value


def _add_headers(
    work: _Work, manifest: StepManifest, rank: int, world: int, present: Collection[str] | None
) -> None:
    """Have the shard headers verified too: each by one rank."""
    first: dict[str, Chunk] = {}
    for record in manifest.tensors:
        for chunk in record.chunks:
            if chunk.file not in first or chunk.start < first[chunk.file].start:
                first[chunk.file] = chunk
    for number, name in enumerate(sorted(first)):
        if number % world == rank if present is None else name in present:
            size = first[name].start
            work.ranges.setdefault(name, []).append(_Range(0, size, None))


@dataclass(slots=True)
class _Run:
    """Neighbouring blocks of a file that are read at once.

    Attributes:
        record: the file.
        blocks: their numbers.
        ranges: what of the file is copied elsewhere.
        memory: where the blocks stay, or None for a buffer that lives as long as the read.
    """

    record: FileRecord
    blocks: range
    ranges: Sequence[_Range]
    memory: memoryview | None


def _plan_file(record: FileRecord, work: _Work, values: dict[int, torch.Tensor]) -> Iterator[_Run]:
    """What is read of a file; pieces that need no memory of their own get their values here."""
    ranges = work.ranges.get(record.name, [])
    direct = work.direct.get(record.name, [])
    items: list[_Range | _Direct] = [*ranges, *direct]
    spans = [(item.start, item.end) for item in items]
    needed = {block for start, end in spans for block in blocks_of(start, end)}
    if needed and max(needed) >= len(record.block_crc32):
        msg = f"{record.name}: a tensor ends behind the file's {record.size} bytes"
        raise DamagedError(msg)
    for blocks in _stretches(needed):
        low, high = blocks.start * BLOCK_BYTES, block_range(record, blocks.stop - 1)[1]
        inside = [item for item in direct if low <= item.start < high]
        copied = [item for item in ranges if item.start < high and low < item.end]
        memory: memoryview | None = None
        # A stretch holds every range that it touches, for neighbours are in one stretch.
        wanted = sum(end - start for start, end in spans if low <= start < high)
        if wanted >= DENSE * (high - low):
            memory = work.memory(high - low)
        for item in inside:
            dtype = TORCH_DTYPES[item.piece.dtype]
            start, end = item.start - low, item.end - low
            if memory is not None and start % dtype.itemsize == 0:
                part = memory[start:end]
            else:
                part = memoryview(bytearray(end - start))
                copied.append(_Range(item.start, item.end, part))
            values[item.index] = torch.frombuffer(part, dtype=dtype).view(item.piece.sizes)
        for first in range(blocks.start, blocks.stop, RUN_BLOCKS):
            run = range(first, min(first + RUN_BLOCKS, blocks.stop))
            begin, stop = first * BLOCK_BYTES, block_range(record, run.stop - 1)[1]
            mine = [item for item in copied if item.start < stop and begin < item.end]
            own = None if memory is None else memory[begin - low : stop - low]
            yield _Run(record, run, mine, own)


def _stretches(blocks: set[int]) -> list[range]:
    """Block numbers as ranges of neighbours."""
    found: list[range] = []
    for block in sorted(blocks):
        if found and found[-1].stop == block:
            found[-1] = range(found[-1].start, block + 1)
        else:
            found.append(range(block, block + 1))
    return found


def _memory(size: int) -> memoryview:
    """Fresh memory, aligned to pages and not touched yet: the threads that read do that.

    Huge pages are not asked for: where memory is fragmented, the kernel takes longer to make
    them than to fault in small ones.
    """
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _read_run(storage: Storage, directory: str, run: _Run) -> None:
    """Read neighbouring blocks, verify each, and hand their bytes out."""
    record = run.record
    low, high = run.blocks.start * BLOCK_BYTES, block_range(record, run.blocks.stop - 1)[1]
    path = f"{directory}/{record.name}"
    data = memoryview(bytearray(high - low)) if run.memory is None else run.memory

    def verify() -> None:
        for block in run.blocks:
            start, end = block_range(record, block)
            verify_block(record, block, data[start - low : end - low], f"{storage.url}/{path}")

    read_verified(storage, path, low, data, verify)
    for item in run.ranges:
        start, end = max(item.start, low), min(item.end, high)
        if item.target is not None and start < end:
            item.target[start - item.start : end - item.start] = data[start - low : end - low]
