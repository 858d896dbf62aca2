"""The gradient norm over real DTensors equals the norm of the whole gradients."""

from __future__ import annotations

import math

import pytest
import torch
from support import ranks_engine
from support.ranks_engine import Call, run_all

pytestmark = pytest.mark.dist
NORMS = [2.0, math.inf]
LAYOUTS = [
    *((world, rank, "shard") for world in (2, 4) for rank in (1, 2, 3)),
    (4, 3, "hybrid"),
    (2, 2, "replicate"),
]


@pytest.fixture(scope="module")
def results() -> dict[str, list]:
    """Everything that runs on ranks, by what it is; two starts in all."""
    calls: dict[int, dict[str, Call]] = {2: {}, 4: {}}
    for norm in NORMS:
        for world, rank, layout in LAYOUTS:
            name = f"{world} {rank} {layout} {norm}"
            calls[world][name] = (ranks_engine.norms, (rank, norm, layout))
        for have in ([], [1], [0]):
            name = f"have {have} {norm}"
            calls[2][name] = (ranks_engine.norms_without_grads, (norm, have))
        for bad in (math.nan, math.inf):
            calls[2][f"bad {bad} {norm}"] = (ranks_engine.norms_nonfinite, (bad, norm))
    return run_all(2, calls[2]) | run_all(4, calls[4])


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize(("world", "lora_rank", "layout"), LAYOUTS)
def test_equals_one_process(
    results: dict[str, list], world: int, lora_rank: int, layout: str, norm_type: float
) -> None:
    grads = ranks_engine.reference_grads(lora_rank)
    wanted = ranks_engine.reference_norm(grads, norm_type)
    ranks = results[f"{world} {lora_rank} {layout} {norm_type}"]
    assert {r["norm"] for r in ranks} == {ranks[0]["norm"]}
    assert ranks[0]["norm"] == pytest.approx(wanted, rel=1e-6)
    if layout == "shard" and lora_rank < world:
        assert any(r["empty"] for r in ranks), "this case is about empty shards"
    for rank in ranks:
        for name, grad in grads.items():
            torch.testing.assert_close(torch.tensor(rank["clipped"][name]), grad / wanted)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("have", [[], [1], [0]])
def test_ranks_without_gradients_take_part(
    results: dict[str, list], norm_type: float, have: list[int]
) -> None:
    wanted = (
        ranks_engine.reference_norm(ranks_engine.reference_grads(2), norm_type) if have else 0.0
    )
    assert results[f"have {have} {norm_type}"] == [pytest.approx(wanted, rel=1e-6)] * 2


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_rank_sees_a_bad_number(
    results: dict[str, list], value: float, norm_type: float
) -> None:
    for norm, untouched in results[f"bad {value} {norm_type}"]:
        assert not math.isfinite(norm)
        assert untouched
