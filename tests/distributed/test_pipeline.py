"""Two pipeline stages train, save, export and hand over what one rank does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks_pipeline
from support.engines import tiny_model
from support.ranks_pipeline import CASES, files
from support.spawn import run_ranks

pytestmark = pytest.mark.dist
CLOSE = {"bf16": 2e-2}
"""Relative difference of losses and norms; fp32 sums in another order differ by far less."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list[Any]]:
    """By what was done, then by rank; the first entry is what one rank did alone."""
    path = tiny_model(root / "model", layers=4)
    one = ranks_pipeline.on_one_rank(path, str(root))
    two = run_ranks(2, ranks_pipeline.on_two_ranks, path, str(root), timeout=240)
    back = ranks_pipeline.back_on_one_rank(path, str(root))
    found = {name: [one.get(name), *(rank[name] for rank in two)] for name in two[0]}
    return found | {name: [value] for name, value in back.items()}


def _alike(ours: list[dict], theirs: list[dict], rel: float = 1e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert b[key] == pytest.approx(a[key], rel=rel), key


@pytest.mark.parametrize("name", CASES)
def test_stages_train_as_one_rank_does(results: dict[str, list[Any]], name: str) -> None:
    one, *two = results[name]
    rel = CLOSE.get(name, 1e-4)
    for rank in two:
        _alike(one["done"], rank["done"], rel)
        for what in ("logprobs", "logits", "reference"):
            if what in one:
                torch.testing.assert_close(rank[what], one[what], rtol=rel, atol=5 * rel)
                assert torch.equal(rank[what], two[0][what])
        assert not rank["model"]
    layers = [part for rank in two for part in rank["parts"]]
    assert sorted(layers) == (
        [[str(i)] for i in range(4)] if name == "interleaved" else [["0", "1"], ["2", "3"]]
    )
    assert one["model"]
    assert sum(rank["trained"] for rank in two) == one["trained"]
    assert (two[0]["trained"] == 0) == (name == "late")


def test_gradients_of_batches_of_several_lengths_add_up(results: dict[str, list[Any]]) -> None:
    one, *two = results["accumulated"]
    assert two == [pytest.approx(one, rel=1e-4)] * 2


@pytest.mark.parametrize("name", ["products", "from one", "from two"])
def test_an_adapter_that_a_stage_has_no_part_of(
    results: dict[str, list[Any]], root: Path, name: str
) -> None:
    """Bits are the same wherever nothing was computed between a load and a save."""
    source = results["products"][1 if name == "from two" else 0]
    for rank in results[name]:
        if rank is None:
            continue
        assert rank["version"] == 3
        assert torch.equal(rank["loaded"], rank["logprobs"])
        # A published version is in bfloat16, of one rank, and B is scaled.
        torch.testing.assert_close(rank["warm"], rank["logprobs"], rtol=0, atol=5e-3)
        torch.testing.assert_close(rank["warm"], source["warm"], rtol=0, atol=1e-5)
        assert not torch.allclose(rank["reference"], rank["logprobs"], atol=1e-4)
        for what in ("logprobs", "reference"):
            torch.testing.assert_close(rank[what], source[what], rtol=0, atol=1e-5)
        _alike([source["next"]], [rank["next"]])
        if name != "products":
            assert rank["served"] == source["served"]
            assert rank["published"] == source["published"]
    if name != "products":
        ours = {"from one": "two from one", "from two": "one from two"}[name]
        theirs = "one" if name == "from one" else "two"
        assert files(root / ours / "adapter") == files(root / theirs / "adapter")


def test_only_stages_that_hold_something_write_a_shard(
    results: dict[str, list[Any]], root: Path
) -> None:
    assert results["products"]
    (step,) = (root / "two" / "run" / "steps").iterdir()
    names = sorted(path.name for path in step.iterdir())
    assert names == ["MANIFEST.json", "shard-00001-of-00002.safetensors", "state.json"]


def test_a_whole_model_is_saved_by_its_stages(results: dict[str, list[Any]], root: Path) -> None:
    one, two = (files(root / f"whole {name}" / "saved") for name in ("one", "two"))
    assert one == two
    assert len(one) >= 2
    for name, source in (("whole from one", 0), ("whole from two", 1)):
        wanted = results["whole"][source]
        for rank in filter(None, results[name]):
            _alike([wanted["next"]], [rank["next"]])


def test_batches_that_cannot_be_are_refused_on_both_ranks(results: dict[str, list[Any]]) -> None:
    for said in results["refused"][1:]:
        assert "split a batch by engine.dp_rank" in said["rows"]
        assert "6 rows do not make 4 micro batches of one size" in said["uneven"]
        assert "were given different input_ids" in said["length"]
