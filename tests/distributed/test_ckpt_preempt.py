"""A signal to one of two ranks: both leave after the same step, and it is committed."""

from __future__ import annotations

import pytest
from support import ranks_busy
from support.spawn import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run_ranks(2, ranks_busy.every_stop, str(tmp_path_factory.mktemp("stop")))


def test_one_rank_is_told_and_both_save_the_same_step(answers):
    first, second = (rank["signal"] for rank in answers)
    assert second.pop("alive")  # the signal no longer ends the process by itself
    assert first == second
    assert first == {
        "step": 3,
        "committed": 3,
        "again": None,
        "still": True,
        "steps": [3],
        "restored": True,
    }


def test_the_deadline_is_kept_when_the_store_is_stuck(answers):
    for rank in answers:
        late = rank["late"]
        assert late["error"].startswith("VoteTimeout: the last save, step 0, was not committed")
        assert 1.5 < late["took"] < 8
        assert late["steps"] == [0]  # given up on, not taken back: it was committed afterwards


def test_neither_an_earlier_error_nor_busy_slots_cost_the_last_save(answers):
    for rank in answers:
        assert rank["error"]["saved"] == [(0, False), (1, False), (2, False)]
    assert "later" not in answers[0]["error"]
    assert answers[1]["error"]["later"] == "only rank 1 knows"
