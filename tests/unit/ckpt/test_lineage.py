"""Which steps a restore may choose from."""

from __future__ import annotations

import random

import pytest

from ckpt.errors import DamagedError
from ckpt.lineage import chain_end, committed_lineage
from ckpt.manifest import WriterRecord


def writer(epoch: int, parent: tuple[int, int] | None = None) -> WriterRecord:
    """A record; parent is (epoch, step)."""
    return WriterRecord(
        epoch=epoch,
        parent_epoch=parent[0] if parent else None,
        parent_step=parent[1] if parent else None,
        host="host",
        pid=1,
        started="2026-01-01T00:00:00Z",
        nonce="n",
    )


def test_an_empty_root() -> None:
    assert committed_lineage([], []) == []


def test_one_writer_newest_first() -> None:
    assert committed_lineage([writer(1)], [(2, 1), (10, 1), (1, 1)]) == [(10, 1), (2, 1), (1, 1)]


def test_a_resume_goes_on_where_it_began() -> None:
    writers = [writer(1), writer(2, (1, 20))]
    steps = [(10, 1), (20, 1), (30, 2)]
    assert committed_lineage(writers, steps) == [(30, 2), (20, 1), (10, 1)]


def test_what_a_stale_writer_added_later_does_not_count() -> None:
    writers = [writer(1), writer(2, (1, 20))]
    steps = [(20, 1), (21, 1), (99, 1), (21, 2)]
    assert committed_lineage(writers, steps) == [(21, 2), (20, 1)]


def test_a_new_writer_counts_before_its_first_step() -> None:
    assert committed_lineage([writer(1), writer(2, (1, 20))], [(20, 1), (30, 1)]) == [(20, 1)]


def test_a_rollback_leaves_the_middle_behind() -> None:
    writers = [writer(1), writer(2, (1, 40)), writer(3, (1, 30))]
    steps = [(30, 1), (40, 1), (41, 2), (50, 2), (31, 3)]
    assert committed_lineage(writers, steps) == [(31, 3), (30, 1)]


def test_a_chain_of_three() -> None:
    writers = [writer(1), writer(2, (1, 40)), writer(3, (2, 50))]
    steps = [(40, 1), (45, 1), (50, 2), (60, 2), (51, 3)]
    assert committed_lineage(writers, steps) == [(51, 3), (50, 2), (40, 1)]


def test_a_fresh_start_forgets_everything_before() -> None:
    writers = [writer(1), writer(2, (1, 40)), writer(3)]
    assert committed_lineage(writers, [(40, 1), (50, 2), (0, 3)]) == [(0, 3)]


def test_steps_of_an_unknown_epoch_do_not_count() -> None:
    assert committed_lineage([writer(1)], [(5, 1), (6, 2), (7, 9)]) == [(5, 1)]


def test_a_lost_parent_record_keeps_what_its_child_vouches_for() -> None:
    assert committed_lineage([writer(3, (2, 20))], [(10, 1), (20, 2), (30, 2), (21, 3)]) == [
        (21, 3),
        (20, 2),
    ]


def test_order_and_repeats_of_the_input_do_not_matter() -> None:
    writers = [writer(1), writer(2, (1, 40)), writer(3, (2, 50))]
    steps = [(40, 1), (45, 1), (50, 2), (60, 2), (51, 3), (51, 3)]
    wanted = committed_lineage(writers, steps)
    for seed in range(20):
        rng = random.Random(seed)
        rng.shuffle(writers)
        rng.shuffle(steps)
        assert committed_lineage(writers, steps) == wanted


def test_two_records_of_one_epoch_are_damage() -> None:
    with pytest.raises(DamagedError, match="two writer records claim epoch 1"):
        committed_lineage([writer(1), writer(1)], [])


@pytest.mark.parametrize("parent", [2, 3])
def test_a_circle_of_parents_is_damage(parent: int) -> None:
    with pytest.raises(DamagedError, match="epoch 2 claims to resume from"):
        committed_lineage([writer(2, (parent, 1))], [])


@pytest.mark.parametrize(
    ("epochs", "end"), [((1, 2, 3), 1), ((2, 3), 1), ((1, 3), 2), ((1, 2), 3), ((), 3)]
)
def test_where_the_records_end(epochs: tuple[int, ...], end: int) -> None:
    records = {1: writer(1), 2: writer(2, (1, 40)), 3: writer(3, (2, 50))}
    assert chain_end({epoch: records[epoch] for epoch in epochs}, 3) == end
