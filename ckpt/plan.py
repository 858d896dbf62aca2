"""Who writes which bytes: DCP's planner, run over descriptions instead of pickled plans.

Every rank describes its pieces with DCP's own local planner. Rank 0 checks that the ranks mean
the same state, deals out what several ranks hold, and proves that what is left covers every tensor
exactly once. The result is cached under a fingerprint; while that holds, a save neither plans nor
talks to another rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from .coverage import tiling_problem
from .dtypes import TORCH_DTYPES, dtype_code
from .errors import PlanError
from .shard import ShardLayout, ShardTensor
from .types import MODEL_PREFIX, AdapterExport, Chunk, TensorRecord


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank holds of one tensor.

    Attributes:
        name: checkpoint name.
        dtype: safetensors code.
        shape: global shape.
        offsets: position of the piece in the global tensor.
        sizes: its extent; a piece without elements is not stored.
        sharded: False for a plain tensor, of which every rank holds all.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    sharded: bool

    @property
    def empty(self) -> bool:
        """Whether it holds no element (an uneven shard on a late rank)."""
        return 0 in self.sizes

    def to_json(self) -> list[Any]:
        """The piece as it is sent to rank 0."""
        return [self.name, self.dtype, self.shape, self.offsets, self.sizes, self.sharded]

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> Piece:
        """The piece that :meth:`to_json` described."""
        name, dtype, shape, offsets, sizes, sharded = value
        return cls(name, dtype, tuple(shape), tuple(offsets), tuple(sizes), sharded)


@dataclass(frozen=True, slots=True)
class Layout:
    """The result of planning, as one rank needs it.

    Attributes:
        fingerprint: of all that the plan depends on, on all ranks.
        held: the pieces this rank holds.
        mine: those of them that it writes.
        shard: byte layout of this rank's file, or None if it writes none.
        writers: ranks that write a file, ascending.
        records: every tensor of the checkpoint with ``file`` set to the writing rank's number;
            known on rank 0 only.
        mesh: the device meshes in use, for the manifest; None for plain tensors.
        copies: replicas that lie in files beside what the manifest names, because a node with a
            tier of its own needs them there; known on rank 0 only.
        parted: whether ranks hold different parts of the model.
    """

    fingerprint: str
    held: tuple[Piece, ...]
    mine: tuple[Piece, ...]
    shard: ShardLayout | None
    writers: tuple[int, ...]
    records: tuple[TensorRecord, ...]
    mesh: dict[str, Any] | None
    copies: tuple[TensorRecord, ...] = ()
    parted: bool = False


def local_pieces(tensors: Mapping[str, torch.Tensor]) -> list[Piece]:
    """This rank's pieces, by DCP's local planner.

    Raises:
        PlanError: a tensor that the planner cannot place (a partial placement, several chunks
            of one tensor on one rank).
        StateError: a dtype that the format does not know.
    """
    pieces: list[Piece] = []
    for name, tensor in tensors.items():
        try:
            # is_coordinator is unused by DCP today; plain tensors are described by all ranks.
            plan = create_default_local_save_plan({name: tensor}, False)
        except RuntimeError as error:
            msg = f"{name} cannot be saved: {error}"
            raise PlanError(msg) from error
        if len(plan.items) > 1:
            msg = f"{name} lies in {len(plan.items)} separate chunks on one rank; want one"
            raise PlanError(msg)
        for item in plan.items:
            data = item.tensor_data
            if data is None:
                msg = f"{name} is a {type(tensor).__name__}, not a tensor"
                raise PlanError(msg)
            pieces.append(
                Piece(
                    name,
                    dtype_code(tensor.dtype),
                    tuple(data.size),
                    tuple(data.chunk.offsets),
                    tuple(data.chunk.sizes),
                    item.type is WriteItemType.SHARD,
                )
            )
    return pieces


def adapter_first(pieces: Sequence[Piece], export: AdapterExport | None) -> list[Piece]:
    """The pieces in the order of a published adapter's file, and behind them all others.

    What lies in a snapshot as it will lie in that file is written and summed up in long runs.
    """
    if export is None:
        return list(pieces)
    keys: dict[str, str] = {}
    for rule in export.rules:
        name = MODEL_PREFIX + rule.source
        keys[name] = min(rule.key, keys.get(name, rule.key))
    return sorted(pieces, key=lambda piece: (piece.name not in keys, keys.get(piece.name, "")))


def difference(first: Sequence[Piece], other: Sequence[Piece], rank: int) -> str | None:
    """The first way in which a rank's state is not rank 0's, or None.

    Args:
        first: rank 0's pieces.
        other: the other rank's pieces.
        rank: the other rank, for the message.
    """
    mine = {piece.name: piece for piece in first}
    theirs = {piece.name: piece for piece in other}
    for name in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None:
            has, lacks = (rank, 0) if a is None else (0, rank)
            return (
                f"{name}: rank {has} has it, rank {lacks} does not (stages of a pipeline are "
                "given as a list, TrainState(model=[stage]))"
            )
        found = _unlike(a, b, 0, rank)
        if found:
            return found
    return None


def _unlike(a: Piece, b: Piece, rank_a: int, rank_b: int) -> str | None:
    """How two ranks' pieces cannot be of one tensor, or None."""
    for what in ("shape", "dtype", "sharded"):
        x, y = getattr(a, what), getattr(b, what)
        if x != y:
            return f"{a.name}: {what} is {x} on rank {rank_a} and {y} on rank {rank_b}"
    return None


def every_tensor(pieces: Sequence[Sequence[Piece]]) -> list[Piece]:
    """One piece of each tensor of any rank.

    Args:
        pieces: what every rank holds, by rank.

    Raises:
        PlanError: ranks disagree about a tensor.
    """
    first: dict[str, tuple[Piece, int]] = {}
    for rank, held in enumerate(pieces):
        for piece in held:
            known, by = first.setdefault(piece.name, (piece, rank))
            found = _unlike(known, piece, by, rank)
            if found:
                msg = f"ranks disagree about what is saved: {found}"
                raise PlanError(msg)
    return [piece for piece, _rank in first.values()]


def assign(pieces: Sequence[Sequence[Piece]], *, parted: bool = False) -> list[list[Piece]]:
    """Decide which rank writes which pieces, each element exactly once.

    Each goes to the holder with the least to write so far; those with few holders come first, and
    among these the largest. (DCP's rule goes rank by rank: under tensor parallelism it gives
    everything that is whole on all ranks to the second one.)

    Args:
        pieces: what every rank holds, by rank.
        parted: ranks may hold different tensors.

    Raises:
        PlanError: ranks disagree, or the pieces do not cover a tensor exactly once.
    """
    for rank, other in enumerate(() if parted else pieces):
        found = difference(pieces[0], other, rank)
        if found:
            msg = f"ranks disagree about what is saved: {found}"
            raise PlanError(msg)
    everything = every_tensor(pieces)
    writers = _writers(pieces)
    assigned = [
        [piece for piece in held if writers.get(_box(piece)) == rank]
        for rank, held in enumerate(pieces)
    ]
    boxes: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for mine in assigned:
        for piece in mine:
            boxes.setdefault(piece.name, []).append((piece.offsets, piece.sizes))
    for piece in everything:
        problem = tiling_problem(piece.shape, boxes.get(piece.name, []))
        if problem:
            msg = f"{piece.name}: {problem}; its placement over the ranks is not understood"
            raise PlanError(msg)
    return assigned


_Box = tuple[str, tuple[int, ...], tuple[int, ...]]
"""A tensor's name, and a place in it: what replicas have in common."""


def _box(piece: Piece) -> _Box:
    return piece.name, piece.offsets, piece.sizes


def _writers(pieces: Sequence[Sequence[Piece]]) -> dict[_Box, int]:
    """The rank that writes each box; boxes without elements are left out."""
    holders: dict[_Box, list[int]] = {}
    sizes: dict[_Box, int] = {}
    for rank, held in enumerate(pieces):
        for piece in held:
            if not piece.empty:
                holders.setdefault(_box(piece), []).append(rank)
                sizes[_box(piece)] = math.prod(piece.sizes) * TORCH_DTYPES[piece.dtype].itemsize
    load = [0] * len(pieces)
    # What few hold comes first: only then is it known who has room for what many hold.
    for box in sorted(holders, key=lambda box: (len(holders[box]), -sizes[box])):
        rank = min(holders[box], key=load.__getitem__)
        load[rank] += sizes[box]
        holders[box] = [rank]
    return {box: ranks[0] for box, ranks in holders.items()}


def with_copies(
    pieces: Sequence[Sequence[Piece]],
    assigned: Sequence[Sequence[Piece]],
    groups: Sequence[Sequence[int]],
) -> list[list[Piece]]:
    """What every rank stores, so that the ranks of each group find in it all that they hold.

    Args:
        pieces: what every rank holds, by rank.
        assigned: what :func:`assign` gave; each rank stores at least that.
        groups: the ranks that share a tier.
    """
    stored = [{piece.name for piece in mine} for mine in assigned]
    for group in groups:
        there = {(p.name, p.offsets, p.sizes) for rank in group for p in assigned[rank]}
        for rank in group:
            for piece in pieces[rank]:
                box = (piece.name, piece.offsets, piece.sizes)
                if not piece.empty and box not in there:
                    there.add(box)
                    stored[rank].add(piece.name)
    return [
        [piece for piece in held if piece.name in names]
        for held, names in zip(pieces, stored, strict=True)
    ]


def shard_layout(pieces: Sequence[Piece]) -> ShardLayout | None:
    """The byte layout of the file with these pieces, or None if there are none."""
    if not pieces:
        return None
    return ShardLayout.build(
        [
            ShardTensor(
                name=piece.name,
                dtype=piece.dtype,
                shape=piece.sizes,
                global_shape=piece.shape,
                offsets=piece.offsets,
            )
            for piece in pieces
        ]
    )


def tensor_records(
    everything: Sequence[Piece],
    assigned: Sequence[Sequence[Piece]],
    stored: Sequence[Sequence[Piece]] | None = None,
) -> tuple[TensorRecord, ...]:
    """The manifest's tensors, sorted by name; ``Chunk.file`` is the writing rank's number.

    Args:
        everything: a piece of every tensor (they name all, also those without elements).
        assigned: the pieces that become chunks, by rank; :func:`assign` gives them.
        stored: all that lies in each rank's file, if that is more.
    """
    chunks: dict[str, list[Chunk]] = {piece.name: [] for piece in everything}
    for rank, mine in enumerate(assigned):
        layout = shard_layout(mine if stored is None else stored[rank])
        if layout is None:
            continue
        for piece in mine:
            start, end = layout.offsets[piece.name]
            chunks[piece.name].append(Chunk(piece.offsets, piece.sizes, str(rank), start, end))
    records = [
        TensorRecord(piece.name, piece.dtype, piece.shape, tuple(chunks[piece.name]))
        for piece in everything
    ]
    return tuple(sorted(records, key=lambda record: record.name))


def extra_records(
    everything: Sequence[Piece],
    assigned: Sequence[Sequence[Piece]],
    stored: Sequence[Sequence[Piece]],
) -> tuple[TensorRecord, ...]:
    """As :func:`tensor_records`, for what is stored but not assigned; without empty records."""
    extra = [
        [piece for piece in all_of_it if piece not in mine]
        for mine, all_of_it in zip(assigned, stored, strict=True)
    ]
    return tuple(r for r in tensor_records(everything, extra, stored) if r.chunks)


def read_items(record: TensorRecord, piece: Piece) -> list[tuple[Chunk, ReadItem]]:
    """Which stored chunks, and which part of each, make up a piece (DCP's resharding)."""
    if piece.empty:
        return []
    metadata = TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[record.dtype]),
        size=torch.Size(record.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in record.chunks
        ],
    )
    wanted = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
    by_offset = {chunk.offsets: chunk for chunk in record.chunks}
    pairs = []
    for item in create_read_items_for_chunk_list(piece.name, metadata, [wanted]):
        offset = item.storage_index.offset
        pairs.append((by_offset[tuple(offset or ())], item))
    return pairs
