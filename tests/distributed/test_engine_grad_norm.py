"""The gradient norm over real DTensors equals the norm of the whole gradients."""

from __future__ import annotations

import math

import pytest
import torch
from support import ranks_engine
from support.spawn import run_ranks

pytestmark = pytest.mark.dist
NORMS = [2.0, math.inf]


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize(
    ("world", "lora_rank", "layout"),
    [(2, 1, "shard"), (2, 3, "shard"), (4, 2, "shard"), (4, 3, "hybrid"), (2, 2, "replicate")],
)
def test_equals_one_process(world: int, lora_rank: int, layout: str, norm_type: float) -> None:
    grads = ranks_engine.reference_grads(lora_rank)
    wanted = ranks_engine.reference_norm(grads, norm_type)
    results = run_ranks(world, ranks_engine.norms, lora_rank, norm_type, layout)
    assert {r["norm"] for r in results} == {results[0]["norm"]}
    assert results[0]["norm"] == pytest.approx(wanted, rel=1e-6)
    if layout == "shard" and lora_rank < world:
        assert any(r["empty"] for r in results), "this case is about empty shards"
    for result in results:
        for name, grad in grads.items():
            torch.testing.assert_close(torch.tensor(result["clipped"][name]), grad / wanted)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("have", [[], [1], [0]])
def test_ranks_without_gradients_take_part(norm_type: float, have: list[int]) -> None:
    wanted = (
        ranks_engine.reference_norm(ranks_engine.reference_grads(2), norm_type) if have else 0.0
    )
    got = run_ranks(2, ranks_engine.norms_without_grads, norm_type, have, timeout=60)
    assert got == [pytest.approx(wanted, rel=1e-6)] * 2


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_rank_sees_a_bad_number(value: float, norm_type: float) -> None:
    for norm, untouched in run_ranks(2, ranks_engine.norms_nonfinite, value, norm_type):
        assert not math.isfinite(norm)
        assert untouched
