"""Adapters under FSDP2 on real gloo ranks equal those of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import ranks_lora
from support.spawn import run_ranks

from archon_lora import LoRAConfig

pytestmark = pytest.mark.dist

HEAD = ("up", "down", "output")  # the head lies in the root's FSDP group
PATTERNED = LoRAConfig(
    rank=4,
    alpha=8,
    seed=11,
    target_modules=HEAD,
    rank_pattern={r"layers\.1\.down": 1},
    alpha_pattern={"up": 6},
)
INIT = {kind: LoRAConfig(rank=3, init=kind, seed=5) for kind in ("kaiming", "gaussian")}
LOW = {r: LoRAConfig(rank=r, alpha=4, seed=2, target_modules=HEAD) for r in (1, 2)}
FP32, BF16 = torch.float32, torch.bfloat16


def _train(config: LoRAConfig, dtype: torch.dtype = FP32, **how: Any) -> tuple[str, tuple]:
    options = {"mixed": False, "placed": True, "wrap": "", **how}
    return "train", (config, dtype, *options.values())


CALLS: dict[int, dict[object, tuple[str, tuple]]] = {
    1: {
        **{("init", kind): ("init_digests", (INIT[kind], False)) for kind in INIT},
        **{("low", r): _train(LOW[r]) for r in LOW},
        "plain": _train(PATTERNED),
    },
    2: {
        **{("init", kind): ("init_digests", (INIT[kind], False)) for kind in INIT},
        **{wrap: _train(PATTERNED, wrap=wrap) for wrap in ("ac", "compile", "compile-in-place")},
        **{("bf16", mixed): _train(PATTERNED, BF16, mixed=mixed) for mixed in (True, False)},
        "placements": ("placements", (LoRAConfig(rank=2),)),
        "load": ("load_and_merge", (PATTERNED, True)),
        "refusal": ("sharded_refusal", ()),
    },
    4: {
        **{("init", kind): ("init_digests", (INIT[kind], True)) for kind in INIT},
        **{("init 2d", kind): ("init_digests_2d", (INIT[kind],)) for kind in INIT},
        **{("low", r, p): _train(LOW[r], placed=p) for r in LOW for p in (True, False)},
        "placements": ("placements", (LoRAConfig(rank=2),)),
        "load": ("load_and_merge", (PATTERNED, False)),
    },
}


@pytest.fixture(scope="module")
def ranks() -> dict[int, list[dict]]:
    """What every rank of each world returned."""
    return {
        world: run_ranks(world, ranks_lora.scenarios, calls, timeout=240)
        for world, calls in CALLS.items()
    }


def close(left: dict, right: dict, tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            torch.tensor(value), torch.tensor(right[name]), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("kind", list(INIT))
def test_initial_bits_are_the_same_on_every_topology(ranks: dict, kind: str) -> None:
    reference = ranks[1][0]["init", kind][0]
    # Tensors of one shape must differ by their names.
    assert reference["layers.0.up.lora_a.weight"] != reference["layers.1.up.lora_a.weight"]
    for world in (1, 2, 4):
        for rank in ranks[world]:
            digests, untouched = rank["init", kind]
            assert digests == reference
            assert untouched, "the base or the global generator changed"
    for rank in ranks[4]:
        digests, dims = rank["init 2d", kind]
        assert dims == [2]
        assert digests == reference


@pytest.mark.parametrize("r", list(LOW))
@pytest.mark.parametrize("placed", [True, False])
def test_rank_below_world_trains_as_one_process_does(ranks: dict, r: int, placed: bool) -> None:
    alone = ranks[1][0]["low", r]
    assert alone["losses"][-1] < alone["losses"][0]
    for result in (rank["low", r, placed] for rank in ranks[4]):
        close(result["state"], alone["state"], 2e-5)
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-4)
        assert result["base_kept"]
        assert result["reference"] < 1e-5


@pytest.mark.parametrize("wrap", ["ac", "compile", "compile-in-place"])
def test_wrappers_change_neither_names_nor_numbers(ranks: dict, wrap: str) -> None:
    alone = ranks[1][0]["plain"]
    for result in (rank[wrap] for rank in ranks[2]):
        assert result["names"] == alone["names"]
        assert not any("_orig_mod" in n or "_checkpoint" in n for n in result["names"])
        close(result["state"], alone["state"], 2e-5)
        assert result["base_kept"]


@pytest.mark.parametrize("mixed", [True, False])
def test_fp32_adapters_over_a_bf16_base(ranks: dict, mixed: bool) -> None:
    results = [rank["bf16", mixed] for rank in ranks[2]]
    for result in results:
        assert result["param_dtypes"] == ["torch.float32"]
        assert result["dtypes"] == ["torch.float32"]
        assert result["base_kept"]
        assert result["losses"][-1] < result["losses"][0]
        assert result["reference"] == 0.0
    assert results[0]["state"] == results[1]["state"]


def test_placements_leave_no_rank_without_a_part_of_a(ranks: dict) -> None:
    two = ranks[2][1]["placements"]
    assert two["layers.0.up.lora_a.weight"] == ("(Shard(dim=1),)", (2, 6))
    assert two["layers.0.up.lora_b.weight"] == ("(Shard(dim=0),)", (5, 2))
    four = [rank["placements"] for rank in ranks[4]]
    assert four[3]["layers.0.up.lora_a.weight"] == ("(Shard(dim=1),)", (2, 3))
    # 10 inputs over 4 ranks do not divide: dimension 0, on which FSDP2 accepts uneven shards.
    assert [rank["layers.0.down.lora_a.weight"] for rank in four] == [
        ("(Shard(dim=0),)", (1, 10)),
        ("(Shard(dim=0),)", (1, 10)),
        ("(Shard(dim=0),)", (0, 10)),
        ("(Shard(dim=0),)", (0, 10)),
    ]


@pytest.mark.parametrize("world", [2, 4])
def test_a_normalised_file_loads_onto_shards(ranks: dict, world: int) -> None:
    for result in (rank["load"] for rank in ranks[world]):
        assert result["refused"], "a damaged file must not change a live tensor"
        assert result["twice"]
        assert result["same_names"]
        assert result["merged_names"]
        assert result["loaded"] < 1e-6
        assert result["merged"] < 1e-5
        assert result["rules"]


def test_apply_after_sharding_is_refused(ranks: dict) -> None:
    for message in (rank["refusal"] for rank in ranks[2]):
        assert "before sharding" in message
        assert "DTensor" in message
