"""Do boxes tile a tensor exactly: every element once, none twice?"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes), one entry a dimension."""

_MAX_SPLIT_DIMS = 12


def tiling_problem(shape: Sequence[int], boxes: Sequence[Box]) -> str | None:
    """Why the boxes do not tile the shape, or None if they do.

    Exact and linear in the number of boxes. The signed corners of a box (sign = parity of the
    number of upper corners taken) are the mixed derivative of its indicator function, and a
    function that vanishes far away is determined by that derivative. So the boxes cover the
    region once everywhere if and only if the signs of all their corners add up to those of the
    region's own corners, and to zero everywhere else. A pairwise comparison would be quadratic.

    Args:
        shape: global shape; a shape without elements is tiled by no boxes at all.
        boxes: pieces; each must lie inside and hold at least one element.
    """
    rank = len(shape)
    if prod(shape) == 0:
        return f"{len(boxes)} chunks for a tensor without elements" if boxes else None
    for offsets, sizes in boxes:
        if len(offsets) != rank or len(sizes) != rank:
            return f"a chunk at {list(offsets)} has another number of dimensions than {list(shape)}"
        for offset, size, extent in zip(offsets, sizes, shape, strict=True):
            if offset < 0 or size < 1 or offset + size > extent:
                return (
                    f"the chunk at {list(offsets)} of size {list(sizes)} is empty or leaves the "
                    f"shape {list(shape)}"
                )
    # A dimension that every chunk spans is a common factor; dropping it keeps 2^rank small.
    split = [
        dim for dim in range(rank) if any(sizes[dim] != shape[dim] for _offsets, sizes in boxes)
    ]
    if len(split) > _MAX_SPLIT_DIMS:
        return f"split along {len(split)} dimensions, more than {_MAX_SPLIT_DIMS}"
    corners: dict[tuple[int, ...], int] = {}
    region: Box = ((0,) * rank, tuple(shape))
    for weight, (offsets, sizes) in [(-1, region), *((1, box) for box in boxes)]:
        for upper in product((0, 1), repeat=len(split)):
            corner = tuple(
                offsets[dim] + (sizes[dim] if up else 0)
                for dim, up in zip(split, upper, strict=True)
            )
            total = corners.get(corner, 0) + (-weight if sum(upper) % 2 else weight)
            if total:
                corners[corner] = total
            else:
                corners.pop(corner, None)
    if not corners:
        return None
    covered = sum(prod(sizes) for _offsets, sizes in boxes)
    if covered < prod(shape):
        return f"the chunks leave a gap: they hold {covered} of {prod(shape)} elements"
    return f"the chunks overlap: they hold {covered} elements for a tensor of {prod(shape)}"
