"""Ranks come from a fork server, and are as good as ones that were started by themselves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import ranks_fresh
from support.spawn import run_ranks

pytestmark = pytest.mark.dist

VARIABLE = "CKPT_TEST_OF_A_VARIABLE"


def test_ranks_have_the_tests_surroundings_and_nothing_of_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_ranks(3, ranks_fresh.surroundings, VARIABLE)  # the servers run already
    monkeypatch.setenv(VARIABLE, "now")
    monkeypatch.chdir(tmp_path)
    found = run_ranks(3, ranks_fresh.surroundings, VARIABLE)
    assert [rank["variable"] for rank in found] == ["now"] * 3
    assert [rank["folder"] for rank in found] == [str(tmp_path)] * 3
    assert [rank["threads"] for rank in found] == [1] * 3
    for key in ("random", "numpy", "pid"):
        assert len({rank[key] for rank in found}) == 3, key
    # What a set's order makes of a rank is to be found out: neighbours differ in it.
    assert found[0]["hash"] != found[1]["hash"] != found[2]["hash"]
    assert os.getpid() not in {rank["pid"] for rank in found}
