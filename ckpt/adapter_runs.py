"""Runs of an adapter file's tensors whose stored bytes follow each other in the file's own order.

Such a run is read, converted, checked and handed on in large pieces, however small its tensors
are. A snapshot is laid out so that an unsharded adapter is one run.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch

from .dtypes import TORCH_DTYPES
from .planned import PlannedStack, PlannedTensor
from .types import Chunk

_FLOATS: Final = frozenset({torch.float32, torch.bfloat16, torch.float16})


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive tensors of the adapter file, each one stored chunk, one behind the other.

    Attributes:
        tensors: in file order.
        ends: for each, how many elements of the run come up to its end.
        stored: dtype of the stored bytes.
    """

    tensors: tuple[PlannedTensor, ...]
    ends: tuple[int, ...]
    stored: torch.dtype

    @classmethod
    def of(cls, tensors: Iterable[PlannedTensor]) -> Run:
        """The run of tensors that :func:`runs` found to be one."""
        held = tuple(tensors)
        ends = tuple(accumulate(math.prod(tensor.shape) for tensor in held))
        return cls(held, ends, TORCH_DTYPES[held[0].record.dtype])

    @property
    def elements(self) -> int:
        """How many there are."""
        return self.ends[-1]

    @property
    def chunk(self) -> Chunk:
        """Where the first byte is stored."""
        return self.tensors[0].record.chunks[0]

    def stays(self, dtype: torch.dtype) -> bool:
        """Whether the file has the stored bytes as they are."""
        return self.stored == dtype and all(tensor.rule.scale == 1.0 for tensor in self.tensors)

    def parts(self, low: int, high: int) -> Iterator[tuple[PlannedTensor, slice]]:
        """The tensors in elements ``[low, high)``, each with its place among these."""
        origin = low
        number = bisect_right(self.ends, low)
        while low < high:
            stop = min(self.ends[number], high)
            yield self.tensors[number], slice(low - origin, stop - origin)
            low, number = stop, number + 1


def runs(
    tensors: Iterable[PlannedTensor | PlannedStack],
) -> Iterator[Run | PlannedTensor | PlannedStack]:
    """Everything in file order: runs, and between them the tensors that are no part of one.

    A tensor that is stored in several chunks, padded, cut out of a larger one, or of a dtype that
    is not an adapter's own, has to be put together row by row.
    """
    held: list[PlannedTensor] = []
    for tensor in tensors:
        whole = tensor if isinstance(tensor, PlannedTensor) and _is_whole(tensor) else None
        if held and not (whole is not None and _follows(whole, held[-1])):
            yield Run.of(held)
            held = []
        if whole is not None:
            held.append(whole)
        else:
            yield tensor
    if held:
        yield Run.of(held)


def _is_whole(tensor: PlannedTensor) -> bool:
    record = tensor.record
    return (
        tensor.rule.index is None
        and tensor.shape == tuple(record.shape)
        and len(record.chunks) == 1
        and TORCH_DTYPES[record.dtype] in _FLOATS
    )


def _follows(tensor: PlannedTensor, last: PlannedTensor) -> bool:
    (chunk,), (before,) = tensor.record.chunks, last.record.chunks
    return (
        tensor.record.dtype == last.record.dtype
        and chunk.file == before.file
        and chunk.start == before.end
    )
