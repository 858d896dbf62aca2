"""Sizes of a layout: what fits how many ranks."""

import pytest

from archon_lora.errors import ParallelConfigError
from archon_lora.models.parallel_dims import ParallelDims


@pytest.mark.parametrize(
    ("dims", "world", "dp_shard", "dp"),
    [
        (ParallelDims(), 1, 1, 1),
        (ParallelDims(), 6, 6, 6),
        (ParallelDims(tp=2), 8, 4, 4),
        (ParallelDims(dp_replicate=2, tp=2), 8, 2, 4),
        (ParallelDims(dp_replicate=4), 4, 1, 4),
        (ParallelDims(pp=2, dp_replicate=2, tp=2), 16, 2, 4),
        (ParallelDims(dp_shard=4, ep=2), 4, 4, 4),
        (ParallelDims(ep=4, tp=2), 8, 4, 4),
        (ParallelDims(dp_shard=1, tp=4, sequence_parallel=True), 4, 1, 1),
    ],
)
def test_resolve(dims, world, dp_shard, dp):
    found = dims.resolve(world)
    assert (found.dp_shard, found.dp) == (dp_shard, dp)
    assert found.resolve(world) == found


@pytest.mark.parametrize(
    ("dims", "world", "message"),
    [
        (ParallelDims(tp=3), 8, r"8 ranks .* pp=1 x dp_replicate=1 x tp=3: .* 3, does not divide"),
        (ParallelDims(tp=2, pp=2), 2, r"their product, 4, does not divide 2"),
        (ParallelDims(dp_shard=2, tp=2), 8, r"dp_shard=2 is 4 ranks, and there are 8; dp_shard=-1"),
        (ParallelDims(ep=4, tp=2), 4, r"leave dp_shard=2, which ep=4 does not divide"),
    ],
)
def test_worlds_that_do_not_fit(dims, world, message):
    with pytest.raises(ParallelConfigError, match=message):
        dims.resolve(world)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tp": 0}, r"tp must be an integer >= 1, got 0"),
        ({"pp": True}, r"pp must be an integer >= 1, got True"),
        ({"ep": -1}, r"ep must be an integer >= 1, got -1"),
        ({"dp_replicate": 1.0}, r"dp_replicate must be an integer >= 1, got 1.0"),
        ({"dp_shard": 0}, r"dp_shard must be an integer >= 1, or -1 for what is left, got 0"),
        ({"dp_shard": 4, "ep": 3}, r"ep must divide dp_shard, got ep=3 and dp_shard=4"),
        ({"sequence_parallel": True}, r"set tp above 1"),
        ({"sequence_parallel": 1, "tp": 2}, r"sequence_parallel must be true or false, got 1"),
    ],
)
def test_values_that_cannot_be(values, message):
    with pytest.raises(ParallelConfigError, match=message):
        ParallelDims(**values)
