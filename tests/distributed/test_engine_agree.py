"""Ranks agree about failures, and nobody waits for ever."""

from __future__ import annotations

import pytest
from support import ranks_engine
from support.spawn import run_ranks

pytestmark = pytest.mark.dist


def test_one_failure_fails_everybody_and_names_the_rank() -> None:
    first, second, third = run_ranks(3, ranks_engine.agreement)
    assert first[0] == second[0] == "PeerFailed: writing failed on rank 2: OSError: disk full"
    assert third[0] == "OSError: disk full"
    wanted = repr([{"rank": r, "text": "é" * r} for r in range(3)])
    assert first[1] == second[1] == third[1] == wanted


def test_a_missing_rank_is_named_at_the_deadline() -> None:
    first, second, _ = run_ranks(3, ranks_engine.late, timeout=60)
    assert "2" in first
    assert "monitoredBarrier" in first
    assert second != "no error"


def test_gather_brings_every_placement_to_rank_0() -> None:
    first, *others = run_ranks(4, ranks_engine.gathered)
    assert first == {
        "columns": (True, "torch.bfloat16"),
        "only_here": True,
        "rows": (True, "torch.float32"),
        "scalar": (True, "torch.float32"),
        "uneven": (True, "torch.int64"),
    }
    for other in others:
        assert all(other.values())
