"""The benchmarks run and write both forms of their results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.dist]


def test_benchmarks_on_one_and_two_ranks(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--workload", "tiny", "--repeats", "2"),
            *("--out", str(tmp_path / "out"), "--folder", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert [case["ranks"] for case in found["cases"]] == [1, 2]
    for case in found["cases"]:
        by_name = {row["saver"]: row for row in case["summary"]}
        assert len(by_name) == 5
        assert by_name["memcpy of the same bytes"]["stall_over_memcpy"] == 1.0
        assert by_name["raw write + fsync"]["total_over_raw_write"] == 1.0
        assert all(len(times) == 2 for times in case["rounds_ms"].values())
        # A save cannot be durable before the training loop got its thread back.
        assert all(row["total_ms"] >= row["stall_ms"] > 0 for row in by_name.values())
    # Two ranks share the bytes: FSDP2 shards, so nothing is saved twice.
    one, two = (case["bytes_per_rank"] for case in found["cases"])
    assert two < 0.75 * one
    assert (tmp_path / "out" / "results.md").read_text(encoding="utf-8") in done.stdout
