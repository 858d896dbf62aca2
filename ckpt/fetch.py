"""Read exactly the bytes that a rank needs of a step, verified, into staging tensors.

Nothing live is touched here. Every block of 8 MiB that holds a needed byte is read once, its
CRC32 is checked, and its bytes are put where they belong: reading is parallel over blocks.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
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
RUN_BLOCKS = 4
"""Blocks in one read: requests large enough for an object store, buffers of at most 32 MiB."""


@dataclass(slots=True)
class _Range:
    """Bytes ``[start, end)`` of a file and the memory they go to."""

    start: int
    end: int
    target: memoryview


@dataclass(slots=True)
class _Region:
    """A box that is not one run of bytes: read whole rows, then cut the box out of them."""

    rows: torch.Tensor
    box: tuple[slice, ...]
    target: torch.Tensor


@dataclass(slots=True)
class _Work:
    ranges: dict[str, list[_Range]] = field(default_factory=dict)
    regions: list[_Region] = field(default_factory=list)


def fetch(
    storage: Storage,
    directory: str,
    manifest: StepManifest,
    pieces: Sequence[Piece],
    *,
    rank: int,
    world: int,
    present: Collection[str] | None = None,
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

    Raises:
        DamagedError: bytes that do not verify, or a file that is too short or missing.
        StorageError: the store failed.
    """
    values = fetch_pieces(
        storage, directory, manifest, pieces, share=(rank, world), present=present
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
) -> list[torch.Tensor]:
    """As :func:`fetch`, in the order of the pieces; several may be of one tensor.

    ``share`` says which part (number, of how many) of the shards' headers is verified as well.
    """
    records = {record.name: record for record in manifest.tensors}
    work = _Work()
    values = [_stage(records[piece.name], piece, work) for piece in pieces]
    files = {record.name: record for record in manifest.files}
    if share is not None:
        _add_headers(work, manifest, *share, present)
    runs = [
        (files[name], ranges, run)
        for name, ranges in work.ranges.items()
        for run in _runs(ranges, files[name])
    ]
    with ThreadPoolExecutor(READ_THREADS, thread_name_prefix="ckpt-read") as pool:
        jobs = [pool.submit(_read_run, storage, directory, *run) for run in runs]
        for job in jobs:
            job.result()
    for region in work.regions:
        region.target.copy_(region.rows[region.box])
    return values


def _stage(record: TensorRecord, piece: Piece, work: _Work) -> torch.Tensor:
    """An uninitialised tensor for a piece, with the reads that fill it noted in ``work``."""
    dtype = TORCH_DTYPES[record.dtype]
    if piece.empty:
        return torch.empty(piece.sizes, dtype=dtype)
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
            header = _Range(0, size, memoryview(bytearray(size)))
            work.ranges.setdefault(name, []).append(header)


def _runs(ranges: Sequence[_Range], record: FileRecord) -> list[range]:
    """The blocks that hold a needed byte, as runs of neighbours of limited length."""
    needed = sorted({block for item in ranges for block in blocks_of(item.start, item.end)})
    if needed and needed[-1] >= len(record.block_crc32):
        msg = f"{record.name}: a tensor ends behind the file's {record.size} bytes"
        raise DamagedError(msg)
    runs: list[range] = []
    for block in needed:
        if runs and runs[-1].stop == block and len(runs[-1]) < RUN_BLOCKS:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def _read_run(
    storage: Storage, directory: str, record: FileRecord, ranges: Sequence[_Range], run: range
) -> None:
    """Read neighbouring blocks, verify each, and hand their bytes out."""
    low, high = run.start * BLOCK_BYTES, block_range(record, run.stop - 1)[1]
    path = f"{directory}/{record.name}"
    data = memoryview(bytearray(high - low))

    def verify() -> None:
        for block in run:
            start, end = block_range(record, block)
            verify_block(record, block, data[start - low : end - low], f"{storage.url}/{path}")

    read_verified(storage, path, low, data, verify)
    for item in ranges:
        start, end = max(item.start, low), min(item.end, high)
        if start < end:
            item.target[start - item.start : end - item.start] = data[start - low : end - low]
