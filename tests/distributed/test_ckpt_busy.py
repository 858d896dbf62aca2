"""Saves that come faster than the store takes them: all ranks do the same with each."""

from __future__ import annotations

import pytest
from support import ranks_busy
from support.spawn import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run_ranks(2, ranks_busy.every_way, str(tmp_path_factory.mktemp("busy")))


@pytest.mark.parametrize("slow", [0, 1])
def test_skip_leaves_the_new_ones_out(answers, slow):
    for rank in answers:
        answer = rank[f"skip slow {slow}"]
        assert answer["found"] == [(0, False), (1, False), (None, True), (None, True), (None, True)]
        assert answer["steps"] == [0, 1, 2]  # 2 was saved again, when there was a slot
        assert answer["skipped"] == [2, 3, 4]
        assert answer["reports"] == 6


@pytest.mark.parametrize("slow", [0, 1])
def test_latest_gives_up_what_still_waits(answers, slow):
    for rank in answers:
        answer = rank[f"latest slow {slow}"]
        assert answer["found"] == [(0, False), (None, True), (None, True), (None, True), (4, False)]
        assert answer["steps"] == [0, 1, 4]
        assert answer["skipped"] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["skip", "latest"])
def test_ranks_of_uneven_speed_stay_agreed(answers, mode):
    first, second = (rank[f"{mode} uneven"] for rank in answers)
    assert first == second
    committed = [step for step, skipped in first["found"] if not skipped]
    assert first["steps"] == committed
    assert first["found"][0] == (0, False)
    assert any(skipped for _step, skipped in first["found"])
    if mode == "latest":
        assert committed[-1] == 29


@pytest.mark.parametrize("mode", ["skip", "latest"])
def test_an_earlier_error_of_one_rank_holds_nobody(answers, mode):
    assert [rank[f"{mode} error"] for rank in answers] == [
        ["EchoError", "NoneType"],
        ["raised only rank 1 knows", "NoneType"],
    ]
