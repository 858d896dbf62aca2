"""Ranks agree about failures, nobody waits for ever, and tensors arrive whole."""

from __future__ import annotations

import pytest
from support import ranks_engine
from support.ranks_engine import run_all

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    return run_all(
        3,
        {
            "agreement": (ranks_engine.agreement, ()),
            "gathered": (ranks_engine.gathered, ()),
            "late": (ranks_engine.late, ()),
        },
    )


def test_one_failure_fails_everybody_and_names_the_rank(results: dict[str, list]) -> None:
    first, second, third = results["agreement"]
    assert first[0] == second[0] == "PeerFailed: writing failed on rank 2: OSError: disk full"
    assert third[0] == "OSError: disk full"
    wanted = repr([{"rank": r, "text": "é" * r} for r in range(3)])
    assert first[1] == second[1] == third[1] == wanted


def test_a_missing_rank_is_named_at_the_deadline(results: dict[str, list]) -> None:
    first, second, third = results["late"]
    assert "monitoredBarrier" in first
    assert "2" in first.split("monitoredBarrier", 1)[1]
    assert second != "no error"
    assert third == "absent"


def test_gather_brings_every_placement_to_the_first_rank(results: dict[str, list]) -> None:
    first, *others = results["gathered"]
    assert first == {
        "columns": (True, "torch.bfloat16"),
        "eight": (True, "torch.float8_e4m3fn"),
        "only_here": True,
        "rows": (True, "torch.float32"),
        "scalar": (True, "torch.float32"),
        "uneven": (True, "torch.int64"),
    }
    for other in others:
        assert all(other.values())
