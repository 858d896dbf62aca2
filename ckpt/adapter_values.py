"""A rank's part of the values of a PEFT adapter: which bytes they are made of, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .adapter_file import AdapterFile
from .adapter_fit import Match
from .dtypes import TORCH_DTYPES
from .errors import NonFiniteError, StateError
from .plan import Piece, local_pieces


@dataclass(frozen=True, slots=True)
class _Take:
    """Whole rows of a PEFT tensor, of which a box is wanted.

    Attributes:
        match: the tensor.
        span: bytes in the weights file.
        rows: shape of what the bytes hold.
        box: the wanted part of them.
        place: where it goes in the rank's part of the live tensor; None if the bytes must be
            padding.
    """

    match: Match
    span: tuple[int, int]
    rows: tuple[int, ...]
    box: tuple[slice, ...]
    place: tuple[slice | int, ...] | None


def adapter_values(
    file: AdapterFile,
    matches: Sequence[Match],
    targets: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world: int,
) -> dict[str, torch.Tensor]:
    """New CPU tensors for this rank's part of every live tensor of the adapter; nothing changes.

    A rank reads the rows that its parts lie in. Rows that are padding are looked at by one rank.

    Args:
        file: the adapter.
        matches: its tensors and theirs, from :func:`ckpt.adapter_fit.fit`.
        targets: the live tensors by canonical FQN.
        rank: this rank.
        world: number of ranks.

    Raises:
        StateError: padding that is not zero.
        NonFiniteError: a value that is not finite, or not so in the live dtype.
        DamagedError: bytes that do not verify.
        StorageError: the store failed.
    """
    pieces = {piece.name: piece for piece in local_pieces(targets)}
    wanted = [
        take
        for number, match in enumerate(matches)
        for take in _takes(file, match, pieces[match.rule.source], padding=number % world == rank)
    ]
    # Only what is read: other adapters of the model keep their values.
    sources = dict.fromkeys(match.rule.source for match in matches)
    values = {
        name: torch.empty(pieces[name].sizes, dtype=TORCH_DTYPES[pieces[name].dtype])
        for name in sources
    }
    for take, data in zip(wanted, file.read([take.span for take in wanted]), strict=True):
        entry = file.tensors[take.match.key]
        rows = torch.frombuffer(data, dtype=TORCH_DTYPES[entry.dtype]).view(take.rows)
        _check_padding(take, rows)
        if take.place is not None:
            value = values[take.match.rule.source]
            value[take.place] = _converted(rows[take.box], take.match, value.dtype)
    return values


def _takes(file: AdapterFile, match: Match, piece: Piece, *, padding: bool) -> list[_Take]:
    offsets, sizes = piece.offsets, piece.sizes
    before: tuple[slice | int, ...] = ()
    if match.rule.index is not None:
        at = match.rule.index - offsets[0]
        inside = 0 <= at < sizes[0]
        offsets, sizes, before = offsets[1:], sizes[1:] if inside else (0,), (at,)
    shape = file.tensors[match.key].shape
    found = []
    if 0 not in sizes:
        others = zip(offsets[1:], sizes[1:], strict=True)
        box = (slice(None), *(slice(offset, offset + size) for offset, size in others))
        place = (*before, *(slice(0, size) for size in sizes))
        found.append(_rows(file, match, offsets[0], sizes[0], box, place))
    if match.rank_dim == 0 and padding and shape[0] > match.rank:
        found.append(_rows(file, match, match.rank, shape[0] - match.rank, (), None))
    return found


def _rows(
    file: AdapterFile,
    match: Match,
    first: int,
    count: int,
    box: tuple[slice, ...],
    place: tuple[slice | int, ...] | None,
) -> _Take:
    entry = file.tensors[match.key]
    row = math.prod(entry.shape[1:]) * TORCH_DTYPES[entry.dtype].itemsize
    start = entry.start + first * row
    return _Take(match, (start, start + count * row), (count, *entry.shape[1:]), box, place)


def _check_padding(take: _Take, rows: torch.Tensor) -> None:
    """What lies beyond the live rank must be zero."""
    if take.place is None:
        surplus = rows
    elif take.match.rank_dim == 1:
        surplus = rows[:, take.match.rank :]
    else:
        return
    if bool((surplus.float() != 0).any()):
        match = take.match
        msg = (
            f"{match.key} has a higher rank than the live {match.rule.source}, which has "
            f"{match.rank}, and what is beyond it is not zero padding; build the adapter with the "
            "file's rank"
        )
        raise StateError(msg)


def _converted(part: torch.Tensor, match: Match, dtype: torch.dtype) -> torch.Tensor:
    # In fp64, so that undoing a scaling that was folded in adds no rounding of its own.
    exact = part if match.factor == 1.0 else part.double() * match.factor
    value = exact.to(dtype)
    wide = value.float() if dtype.itemsize == 1 else value  # torch orders no 8-bit floats
    # The extremes carry NaN and infinity along, at a small part of an element-wise test's cost.
    if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(wide)):
        if bool(torch.isfinite(part.double()).all()):
            msg = (
                f"{match.key} has values that do not fit {dtype}, the dtype of {match.rule.source}"
            )
        else:
            msg = f"{match.key} holds NaN or infinity"
        raise NonFiniteError(f"{msg}; nothing was changed")
    return value
