"""The benchmarks run and write every form of their results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.handoff import PARTS, STAND_IN

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.e2e, pytest.mark.dist]


def test_sections_on_one_and_two_ranks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "--workload", "tiny", "--repeats", "2"),
            *("--only", "saves-2", "saves-memory", "publishes", "loads", "handoff"),
            *("--out", str(out), "--folder", str(tmp_path), "--memory-folder", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    sections = found["sections"]
    assert sections.keys() == {"saves-2", "saves-memory", "publishes", "loads", "handoff"}
    for section in sections.values():
        assert all(len(samples) == 2 for samples in section["rounds"].values())
    for name in ("saves-2", "saves-memory"):
        for samples in sections[name]["rounds"].values():
            # A save cannot be complete before the training loop got its thread back.
            assert all(sample["total"] >= sample["stall"] > 0 for sample in samples)
    # Two ranks share the bytes: FSDP2 shards, so nothing is saved twice.
    one, two = (sections[name]["bytes_per_rank"] for name in ("saves-memory", "saves-2"))
    assert two < 0.75 * one
    assert sections["saves-2"]["plan"]["collectives"] == 0
    for sample in sections["handoff"]["rounds"][STAND_IN]:
        assert all(sample[part] >= 0 for part in PARTS)
        assert sum(sample[part] for part in PARTS) == pytest.approx(sample["total"])
        assert sample["ours"] == pytest.approx(sample["total"] - sample["load"])
    assert [row["what"][:6] for row in found["rows"]].count("publis") == 2  # and the hand-over
    text = (out / "results.md").read_text(encoding="utf-8")
    assert text in done.stdout
    assert found["table"] in text
    assert (out / "numbers.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "saves-2.png").exists()
