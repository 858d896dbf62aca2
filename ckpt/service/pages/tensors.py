"""A step down to its tensors: which shard has which piece, as pictures and as numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ckpt.layout import parse_shard_name
from ckpt.wire import ChunkRow, FileRow, TensorRow

_NUMBER: Final = re.compile(r"([0-9]{1,9})")
PAGE: Final = 60
COLOURS: Final = 8
"""Ranks share so many colours."""
MOST_PIECES: Final = 64
"""Pieces of one tensor that are drawn and listed; the others are counted."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a tensor: its rectangle in a picture of 100 by 40, its rank, and its place."""

    x: float
    y: float
    width: float
    height: float
    colour: int
    rank: int | None
    place: str
    file: str
    bytes: int


@dataclass(frozen=True, slots=True)
class TensorView:
    """A tensor with its pieces.

    Attributes:
        row: what the manifest says.
        pieces: those that are shown.
        hidden: how many are not.
        placement: in words.
    """

    row: TensorRow
    pieces: tuple[Piece, ...]
    hidden: int
    placement: str


@dataclass(frozen=True, slots=True)
class ShardView:
    """A file of a step, with the rank that wrote it and its share of all bytes."""

    row: FileRow
    rank: int | None
    colour: int
    tensors: int
    share: float


def tensor_view(tensor: TensorRow) -> TensorView:
    """A tensor as a page shows it."""
    shown = tensor.chunks[:MOST_PIECES]
    return TensorView(
        tensor,
        tuple(_piece(tensor.shape, chunk) for chunk in shown),
        len(tensor.chunks) - len(shown),
        placement(tensor.shape, tensor.chunks),
    )


def placement(shape: Sequence[int], chunks: Sequence[ChunkRow]) -> str:
    """How a tensor is laid out, in words."""
    if len(chunks) <= 1:
        return "whole"
    split = [dim for dim in range(len(shape)) if len({chunk.offsets[dim] for chunk in chunks}) > 1]
    dims = " and ".join(str(dim) for dim in split)
    return f"{len(chunks)} pieces along dimension {dims}" if split else f"{len(chunks)} pieces"


def _piece(shape: Sequence[int], chunk: ChunkRow) -> Piece:
    # The last dimension lies from left to right; all the others are one, from the top down.
    width = shape[-1] if shape else 1
    rows = math.prod(shape[:-1]) if len(shape) > 1 else 1
    inner = math.prod(shape[1:-1]) if len(shape) > 2 else 1
    x, across = (chunk.offsets[-1], chunk.sizes[-1]) if shape else (0, 1)
    y, down = (chunk.offsets[0] * inner, chunk.sizes[0] * inner) if len(shape) > 1 else (0, 1)
    rank = rank_of(chunk.file)
    ends = [a + b for a, b in zip(chunk.offsets, chunk.sizes, strict=True)]
    place = ", ".join(f"{a}:{b}" for a, b in zip(chunk.offsets, ends, strict=True))
    return Piece(
        x=round(100 * x / max(1, width), 3),
        y=round(40 * y / max(1, rows), 3),
        width=round(100 * across / max(1, width), 3),
        height=round(40 * down / max(1, rows), 3),
        colour=(rank or 0) % COLOURS,
        rank=rank,
        place=f"[{place}]",
        file=chunk.file,
        bytes=chunk.end - chunk.start,
    )


def meshes(mesh: Mapping[str, Any] | None) -> list[str]:
    """The device meshes of a step in words, as far as they can be understood."""
    found = (mesh or {}).get("meshes")
    words = []
    for one in found[:4] if isinstance(found, list) else ():
        shape = one.get("shape") if isinstance(one, dict) else None
        if not isinstance(shape, list) or not all(isinstance(size, int) for size in shape[:8]):
            continue
        names = one.get("dim_names")
        text = " by ".join(str(size) for size in shape[:8])
        words.append(
            f"{text} ({', '.join(map(str, names[:8]))})" if isinstance(names, list) else text
        )
    return words


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A name's place where ``layers.9`` comes before ``layers.10``."""
    parts = _NUMBER.split(name)
    return tuple((int(part), "") if at % 2 else (0, part) for at, part in enumerate(parts))


def rank_of(file: str) -> int | None:
    """Which rank wrote a file, by its name."""
    parsed = parse_shard_name(file.rpartition("/")[2])
    return None if parsed is None else parsed[0]


def shard_views(files: Iterable[FileRow], tensors: Iterable[TensorRow]) -> list[ShardView]:
    """The files of a step."""
    held: dict[str, set[str]] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            held.setdefault(chunk.file, set()).add(tensor.name)
    rows = list(files)
    largest = max((row.bytes for row in rows), default=0) or 1
    return [
        ShardView(
            row,
            rank := rank_of(row.name),
            (rank or 0) % COLOURS,
            len(held.get(row.name, ())),
            round(100 * row.bytes / largest, 2),
        )
        for row in rows
    ]
