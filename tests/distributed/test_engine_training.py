"""Training over ranks gives the numbers of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import ranks_engine
from support.engines import tiny_model
from support.ranks_engine import Call, run_all

from archon_lora.config import LoRAConfig

pytestmark = pytest.mark.dist
STEPS = 3

CASES = {
    "fp32": {},
    "rank 1": {"lora": LoRAConfig(rank=1, alpha=2.0)},
    "head": {"lora": LoRAConfig(rank=3, target_modules=["lm_head", "q_proj", "down_proj"])},
    "recomputed": {"activation_checkpointing": True, "micro_batches": 2},
    "compiled": {"compile": True, "compile_backend": "eager"},
    "full": {"lora": None},
    "bf16": {"dtype": "bfloat16"},
}
SINKS = ([0], [1], [0, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def results(model: str) -> dict[int, dict[str, list]]:
    """Everything that runs on ranks, by number of ranks and name; three starts in all."""
    before = {p.name: p.read_bytes() for p in Path(model).iterdir()}
    calls: dict[str, Call] = {
        name: (ranks_engine.train_and_look, (model, STEPS, options))
        for name, options in CASES.items()
    }
    below = {"rank 2": (ranks_engine.train_and_look, (model, STEPS, {"lora": LoRAConfig(rank=2)}))}
    two = {f"sinks {w}": (ranks_engine.hand_over, (model, w)) for w in SINKS}
    two["bad start"] = (ranks_engine.bad_start, (model,))
    two["uneven"] = (ranks_engine.uneven_batches, (model,))
    found = {
        1: run_all(1, {**calls, **below, "sinks": (ranks_engine.hand_over, (model, [0]))}),
        2: run_all(2, {**calls, **two}),
        4: run_all(4, below),
    }
    assert {p.name: p.read_bytes() for p in Path(model).iterdir()} == before
    return found


@pytest.mark.parametrize("case", [name for name in CASES if name != "bf16"])
def test_two_ranks_train_like_one(results: dict[int, dict[str, list]], case: str) -> None:
    (alone,), many = results[1][case], results[2][case]
    assert many[0]["done"] == many[1]["done"], "every rank reports the same bits"
    for ours, theirs in zip(alone["done"], many[0]["done"], strict=True):
        for key in ("loss", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=2e-4)
    assert many[0]["start"] == alone["start"], "the same initial bits on any number of ranks"
    for result in (alone, *many):
        assert result["base_same"]
        assert result["moved"] == len(result["adapter"]) == result["optimized"] > 0
    for name, value in alone["adapter"].items():
        torch.testing.assert_close(
            torch.tensor(many[0]["adapter"][name]), torch.tensor(value), rtol=1e-3, atol=2e-4
        )


def test_bf16_base_over_two_ranks(results: dict[int, dict[str, list]]) -> None:
    (alone,), many = results[1]["bf16"], results[2]["bf16"]
    assert many[0]["done"] == many[1]["done"]
    for ours, theirs in zip(alone["done"], many[0]["done"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-2)
    assert all(r["base_same"] and r["moved"] == r["optimized"] for r in (alone, *many))


def test_four_ranks_with_a_rank_below_their_number(results: dict[int, dict[str, list]]) -> None:
    (alone,), many = results[1]["rank 2"], results[4]["rank 2"]
    for ours, theirs in zip(alone["done"], many[3]["done"], strict=True):
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=2e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=2e-4)


def test_a_rank_without_rows_stops_all_ranks_and_nobody_hangs(
    results: dict[int, dict[str, list]],
) -> None:
    first, second = results[2]["uneven"]
    assert first == "1 other rank(s) have a batch that cannot be used; see their errors"
    assert second.startswith("0 rows cannot make 1 micro batches")


def test_a_rank_that_cannot_build_its_model_stops_all_ranks(
    results: dict[int, dict[str, list]],
) -> None:
    first, second = results[2]["bad start"]
    assert first.startswith("PeerFailed: building ")
    assert "rank 1: ModelLoadError: cannot read" in first
    assert second.startswith("ModelLoadError: cannot read")


@pytest.mark.parametrize("where", SINKS)
def test_every_sink_gets_the_whole_adapter(
    results: dict[int, dict[str, list]], where: list[int]
) -> None:
    (wanted,) = results[1]["sinks"]
    calls = results[2][f"sinks {where}"]
    assert [c for rank in where for c in calls[rank]] == wanted * len(where)
    assert [r for r in range(2) if calls[r]] == where
