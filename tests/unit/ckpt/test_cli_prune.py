"""``ckpt prune``, ``pin`` and ``unpin``: what they print, delete and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.publishers import publish
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.holds import take_lease
from ckpt.storage import open_storage


def ckpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ckpt_json(*arguments: object) -> Any:
    result = ckpt(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 0 to 4 of writer 1, of which 3 and 4 were abandoned by writer 2's 3 and 4."""
    root = tmp_path / "root"
    storage = open_storage(root)
    tensors, export = tiny_adapter()
    for step in range(5):
        write_step(storage, step, tensors, export=export, metrics={"reward": 1.0 - step / 10})
    for seed in range(3):
        publish(str(root), "run7", seed)
    write_writer(storage, 2, parent=(2, 1))
    for step in (3, 4):
        write_step(storage, step, tensors, epoch=2, export=export)
    return root


def names(root: Path, folder: str = "steps") -> list[str]:
    return sorted(path.name for path in (root / folder).iterdir() if path.is_dir())


def test_a_dry_run_says_what_would_go_and_why(root):
    before = sorted(str(path) for path in root.rglob("*"))
    found = ckpt_json(
        "prune", root, "--keep-latest", 1, "--every", 2, "--best", 1, "--metric", "reward",
        "--dry-run",
    )  # fmt: skip
    assert found["dry_run"] is True
    assert {row["path"]: (row["keep"], row["reason"]) for row in found["entries"]} == {
        "steps/step-00000000.w0001": (True, "a multiple of 2, among the best 1 by reward (1)"),
        "steps/step-00000001.w0001": (False, "no rule keeps it"),
        "steps/step-00000002.w0001": (True, "a multiple of 2"),
        "steps/step-00000003.w0001": (False, "abandoned: a later writer resumed from before it"),
        "steps/step-00000003.w0002": (False, "no rule keeps it"),
        "steps/step-00000004.w0001": (False, "abandoned: a later writer resumed from before it"),
        "steps/step-00000004.w0002": (True, "newest valid, a multiple of 2"),
    }
    result = ckpt("prune", root, "--keep-latest", 1, "--dry-run")
    assert result.exit_code == 0
    assert "6 of 7 would go" in result.stdout
    assert "removed" not in result.stdout
    assert sorted(str(path) for path in root.rglob("*")) == before


def test_prune_deletes_what_the_dry_run_names(root):
    rule = ("--keep-latest", 2, "--best", 1, "--metric", "reward", "--mode", "min")
    dry = ckpt_json("prune", root, *rule, "--dry-run")
    real = ckpt_json("prune", root, *rule)
    assert real == {**dry, "dry_run": False}
    assert names(root) == [
        "step-00000002.w0001",  # the smallest reward of the lineage
        "step-00000003.w0002",
        "step-00000004.w0002",
    ]
    assert len(names(root, "adapters")) == 3
    assert "0 of 3 removed" in ckpt("prune", root, *rule).stdout


def test_versions_are_pruned_by_number(root):
    take_lease(open_storage(root), "run7-v00000001", "replica", 60)
    rows = ckpt_json("prune", root, "--keep-versions", 1)["entries"]
    assert [(row["keep"], row["reason"]) for row in rows] == [
        (True, "in use by replica"),
        (False, "not among the newest 1"),
        (True, "among the newest 1"),
    ]
    assert names(root, "adapters") == ["run7-v00000001", "run7-v00000003"]
    assert len(names(root)) == 7
    assert ckpt_json("prune", root, "--keep-versions", 1, "--run", "other")["entries"] == []


def test_pin_and_unpin(root):
    said = ckpt_json("pin", root, "--step", 1, "--note", "for the paper")
    assert said == {"pinned": "step-00000001.w0001", "note": "for the paper"}
    assert "pinned run7-v00000001" in ckpt("pin", root, "--version", "run7-v00000001").stdout
    # An abandoned step needs its writer's number, as everywhere.
    assert ckpt("pin", root, "--step", 4, "--epoch", 1).exit_code == 0
    ckpt("prune", root, "--keep-latest", 1, "--keep-versions", 1)
    assert names(root) == ["step-00000001.w0001", "step-00000004.w0001", "step-00000004.w0002"]
    assert names(root, "adapters") == ["run7-v00000001", "run7-v00000003"]
    assert ckpt_json("unpin", root, "--step", 1) == {"unpinned": ["step-00000001.w0001"]}
    assert "unpinned run7-v00000001" in ckpt("unpin", root, "--version", "run7-v00000001").stdout
    ckpt("prune", root, "--keep-latest", 1, "--keep-versions", 1)
    assert names(root) == ["step-00000004.w0001", "step-00000004.w0002"]
    assert names(root, "adapters") == ["run7-v00000003"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prune",), "name a rule"),
        (("prune", "--best", 1, "--metric", "x"), "name a rule"),
        (("prune", "--keep-versions", 1, "--every", 2), "add to --keep-latest"),
        (("prune", "--keep-latest", 1, "--best", 1), "belong together"),
        (("pin",), "--step or --version"),
        (("pin", "--step", 1, "--version", "run7-v00000001"), "exclude each other"),
        (("pin", "--step", 77), "no step 77"),
        (("pin", "--version", "run7-v00000077"), "does not exist"),
        (("unpin", "--step", 1), "not pinned"),
        (("unpin", "--version", "run7-v00000001"), "not pinned"),
    ],
)
def test_requests_that_cannot_be_met(root, arguments, message):
    command, *rest = arguments
    result = ckpt(command, root, *rest)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(names(root)) == 7
