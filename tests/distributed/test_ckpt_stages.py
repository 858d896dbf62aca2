"""Ranks with different parameters, with several stages or with none at all: one checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ranks_stages
from support.ranks_stages import LAYERS, STEPS, WHOLE, version_of
from support.spawn import run_ranks

from ckpt.layout import MANIFEST
from ckpt.manifest import StepManifest

pytestmark = pytest.mark.dist


def _union(ranks: list[dict]) -> dict[str, str]:
    """What all ranks hold together; what two of them hold is the same."""
    found: dict[str, str] = {}
    for rank in ranks:
        for name, digest in rank.items():
            assert found.setdefault(name, digest) == digest
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list]:
    """A run of the whole model on one rank, runs in stages on three, and back on one."""
    parts, whole = str(root / "parts"), str(root / "whole")
    found = {"whole": [ranks_stages.train_and_save(0, 1, whole, WHOLE)]}
    ranks = run_ranks(3, ranks_stages.on_three_ranks, str(root), timeout=240)
    found |= {name: [rank[name] for rank in ranks] for name in ranks[0]}
    found["back"] = [ranks_stages.resume(0, 1, parts, WHOLE, STEPS + 100)]
    found["warm whole"] = [ranks_stages.warm(0, 1, str(root / "alone"), WHOLE, version_of(whole))]
    return found


def _manifest(root: Path, step: int) -> StepManifest:
    (path,) = root.glob(f"steps/step-{step:08}.*/{MANIFEST}")
    return StepManifest.from_bytes(path.read_bytes(), str(path))


def test_the_stages_hold_together_what_one_rank_holds(results: dict[str, list], root: Path) -> None:
    (whole,) = results["whole"]
    parts = results["parts"]
    assert [len(rank["names"]) for rank in parts] == [0, 8, 16]
    assert _union([rank["digests"] for rank in parts]) == whole["digests"]
    ours, theirs = (_manifest(root / name, STEPS) for name in ("parts", "whole"))
    assert [(t.name, t.dtype, t.shape) for t in ours.tensors] == [
        (t.name, t.dtype, t.shape) for t in theirs.tensors
    ]
    files = [file.name for file in ours.files]
    # None of the rank that holds nothing.
    assert files == [
        "shard-00001-of-00003.safetensors",
        "shard-00002-of-00003.safetensors",
        "state.json",
    ]


def test_versions_are_the_same_bytes(results: dict[str, list]) -> None:
    (whole,) = results["whole"]
    assert whole["version"] is not None
    assert [rank["version"] for rank in results["parts"]] == [whole["version"]] * 3


def test_a_stage_whose_own_layout_stays_joins_the_others_plan(results: dict[str, list]) -> None:
    # Moments come into being with the first update, and on some ranks only: two plans for steps,
    # one for the version without them, on every rank; nothing is planned again afterwards.
    assert [rank["plans"] for rank in results["parts"]] == [3, 3, 3]


@pytest.mark.parametrize("name", ["other", "from whole", "back"])
def test_every_division_restores_every_other(results: dict[str, list], name: str) -> None:
    found = results[name]
    assert {rank["start"] for rank in found} == {STEPS + 100 if name == "back" else STEPS}
    assert _union([rank["digests"] for rank in found]) == results["whole"][0]["digests"]
    assert all(rank["extra"] == {"policy_version": STEPS} for rank in found)


def test_a_warm_start_gives_each_stage_its_own(results: dict[str, list]) -> None:
    parts = _union(results["warm"])
    assert len(parts) == 1 + 2 * (LAYERS - 1)
    assert parts == results["warm whole"][0]


def test_what_does_not_fit_together_is_refused_on_every_rank(results: dict[str, list]) -> None:
    for said in results["refused"]:
        assert said["lacking"].startswith("StateError: ")
        assert "the live state lacks model.layers.3.a, model.layers.3.b" in said["lacking"]
        assert said["left out"].split() == [
            "model.layers.3.a",
            "model.layers.3.b",
            "optim.layers.3.a",
            "optim.layers.3.b",
        ]
        assert "model as a list of stages is True on rank 0 and False on rank 2" in said["mixed"]
        assert "no parameter that requires a gradient" in said["idle"]
        assert "the adapter export differs between rank 0 and rank 1" in said["export"]
        assert "the schedules of the parts of one state differ" in said["schedule"]
        assert "stages of a pipeline are given as a list" in said["not a list"]


def test_each_node_keeps_the_stages_of_its_ranks(results: dict[str, list], root: Path) -> None:
    first, second, third = results["tiers"]
    assert all(rank["local"] and rank["same"] for rank in (first, second, third))
    assert first["shards"] == second["shards"] == ["shard-00001-of-00003.safetensors"]
    assert third["shards"] == ["shard-00002-of-00003.safetensors"]
    remote = _manifest(root / "remote", 0)
    assert len(remote.files) == 3
    assert len(remote.tensors) == 24


def test_replicas_are_written_once_and_share_the_work(tmp_path: Path) -> None:
    found = run_ranks(4, ranks_stages.replicas, str(tmp_path))
    assert all(rank["held"] == found[0]["held"] for rank in found)
    files = {file.name: file.size for file in _manifest(tmp_path, 0).files}
    shards = [size for name, size in files.items() if name.startswith("shard-")]
    assert len(shards) == 4
    # Headers and alignment are all that is beside one copy of every tensor.
    assert found[0]["whole"] < sum(shards) < found[0]["whole"] + 4 * 8192
    assert max(shards) < 1.3 * min(shards)
