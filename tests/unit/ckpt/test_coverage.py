"""Exact tilings, against a comparison element by element."""

from __future__ import annotations

import itertools
import random

import pytest

from ckpt.coverage import Box, tiling_problem


def counted(shape: tuple[int, ...], boxes: list[Box]) -> bool:
    """The slow truth: every box lies inside, and every element is in exactly one."""
    for offsets, sizes in boxes:
        if any(o + s > extent for o, s, extent in zip(offsets, sizes, shape, strict=True)):
            return False
    for element in itertools.product(*(range(extent) for extent in shape)):
        hits = sum(
            all(o <= e < o + s for e, o, s in zip(element, offsets, sizes, strict=True))
            for offsets, sizes in boxes
        )
        if hits != 1:
            return False
    return True


def random_tiling(rng: random.Random, offsets, sizes, depth: int) -> list[Box]:
    splittable = [d for d, size in enumerate(sizes) if size > 1]
    if not splittable or depth == 0:
        return [(tuple(offsets), tuple(sizes))]
    dim = rng.choice(splittable)
    at = rng.randrange(1, sizes[dim])
    low, high = list(sizes), list(sizes)
    low[dim], high[dim] = at, sizes[dim] - at
    moved = list(offsets)
    moved[dim] += at
    return random_tiling(rng, offsets, low, depth - 1) + random_tiling(rng, moved, high, depth - 1)


@pytest.mark.parametrize("seed", range(60))
def test_agrees_with_counting(seed: int) -> None:
    rng = random.Random(seed)
    shape = tuple(rng.randrange(1, 6) for _ in range(rng.randrange(1, 4)))
    boxes = random_tiling(rng, (0,) * len(shape), shape, rng.randrange(5))
    rng.shuffle(boxes)
    assert tiling_problem(shape, boxes) is None
    assert counted(shape, boxes)
    for _ in range(10):  # one box moved, resized, dropped or doubled
        damaged = list(boxes)
        index = rng.randrange(len(damaged))
        offsets, sizes = (list(part) for part in damaged[index])
        dim = rng.randrange(len(shape))
        kind = rng.randrange(4)
        if kind == 0:
            offsets[dim] = rng.randrange(0, shape[dim])
        elif kind == 1:
            sizes[dim] = rng.randrange(1, shape[dim] + 1)
        elif kind == 2:
            del damaged[index]
        else:
            damaged.append(damaged[index])
        if kind < 2:
            damaged[index] = (tuple(offsets), tuple(sizes))
        assert (tiling_problem(shape, damaged) is None) == counted(shape, damaged)


def test_equal_volume_does_not_fool_it() -> None:
    # Four elements of four, but one twice and one never.
    problem = tiling_problem((4,), [((0,), (2,)), ((1,), (1,)), ((3,), (1,))])
    assert problem is not None
    assert "overlap" in problem


def test_a_pinwheel_is_a_tiling() -> None:
    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    assert tiling_problem((3, 3), boxes) is None


@pytest.mark.parametrize(
    ("shape", "boxes", "problem"),
    [
        ((), [((), ())], None),
        ((), [], "gap"),
        ((), [((), ()), ((), ())], "overlap"),
        ((0, 3), [], None),
        ((0, 3), [((0, 0), (0, 3))], "without elements"),
        ((3,), [((0,), (3,)), ((3,), (0,))], "is empty"),
        ((3,), [((0,), (4,))], "leaves the shape"),
        ((3,), [((-1,), (4,))], "leaves the shape"),
        ((3,), [((0, 0), (3, 1))], "another number of dimensions"),
        ((3,), [], "gap: they hold 0 of 3"),
    ],
)
def test_edges(shape, boxes, problem: str | None) -> None:
    found = tiling_problem(shape, boxes)
    assert (found is None) if problem is None else (found is not None and problem in found)


def test_many_dimensions_that_nobody_splits_are_free() -> None:
    shape = (4, *(2,) * 40)
    rest = (0,) * 40
    boxes = [((at, *rest), (1, *(2,) * 40)) for at in range(4)]
    assert tiling_problem(shape, boxes) is None
    assert "gap" in tiling_problem(shape, boxes[:3])


def test_too_many_split_dimensions_are_refused_at_once() -> None:
    boxes = [((0,) * 20, (1,) * 20)]
    assert "split along 20 dimensions" in tiling_problem((2,) * 20, boxes)


def test_ten_thousand_pieces_are_quick() -> None:
    boxes = [((r, c * 10), (1, 10)) for r in range(1000) for c in range(10)]
    assert tiling_problem((1000, 100), boxes) is None
    assert "gap" in tiling_problem((1000, 100), boxes[1:])
