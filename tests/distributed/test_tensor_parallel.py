"""Layouts over real processes: meshes, and tensor parallelism beside FSDP2 and HSDP.

A run on any layout must compute what one process computes. Every spawn has a deadline, so that a
deadlock between FSDP2's collectives and those of tensor parallelism is a failure and no hang.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks_tp
from support.engines import tiny_model
from support.families import CASES, write_family
from support.ranks_tp import Case
from support.spawn import run_ranks

from archon_lora import LoRAConfig
from archon_lora.models.parallel_dims import ParallelDims

FULL = os.environ.get("ARCHON_LAYOUTS") == "full"
"""Every layout with every rank, and every family with every layout; a sample by default."""

DEADLINE = 3000.0 if FULL else 280.0
pytestmark = [pytest.mark.dist, pytest.mark.timeout(2 * DEADLINE)]
RECOMPUTED = {"activation_checkpointing": True}
COMPILED = {"compile": True, "compile_backend": "aot_eager"}


def adapter(rank: int, *targets: str) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=2 * rank, target_modules=targets or "all-linear")


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal but for the order of sums, in fp32."""
    scale = max(1.0, float(wanted.abs().max()) if wanted.numel() else 0.0)
    return got.shape == wanted.shape and bool(((got - wanted).abs() <= 2e-6 * scale).all())


def assert_same(name: str, case: Case, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    dims = case.dims.resolve(4)
    assert found["first"].keys() == wanted["first"].keys()
    for key, value in wanted["first"].items():
        assert torch.equal(found["first"][key], value), (name, key)
    real = ranks_tp.batch(0)[1].chunk(dims.dp)[found["dp_rank"]].bool()
    logits = wanted["logits"].chunk(dims.dp)[found["dp_rank"]]
    assert close(found["logits"][real], logits[real]), name
    for key, value in wanted["grads"].items():
        assert close(found["grads"][key], value), (name, key)
    assert found["norms"][0] == pytest.approx(wanted["norms"][0], rel=3e-6), name
    for key in ("norms", "losses"):  # of later steps too, which the last bits of Adam move
        assert found[key] == pytest.approx(wanted[key], rel=5e-5), (name, key)
    for key, value in wanted["trained"].items():
        assert torch.allclose(found["trained"][key], value, rtol=0, atol=1e-5), (name, key)
    assert found["state"] == wanted["state"]


LAYOUTS = {
    "fsdp x tp": ParallelDims(tp=2),
    "fsdp x sp": ParallelDims(tp=2, sequence_parallel=True),
    "hsdp": ParallelDims(dp_replicate=2),
    "hsdp x sp": ParallelDims(dp_replicate=2, tp=2, sequence_parallel=True),
    "tp 4": ParallelDims(tp=4),
    "sp 4": ParallelDims(tp=4, sequence_parallel=True),
}
MESHES = [
    ParallelDims(),
    ParallelDims(dp_replicate=2),
    ParallelDims(pp=2, tp=2),
    ParallelDims(ep=2),
    ParallelDims(dp_replicate=2, ep=2),
    ParallelDims(tp=2),
]
FAMILIES = ("gemma2", "gemma3", "llama-tied-biased", "qwen3", "mistral-window", "qwen3-moe-mixed")


def layout_cases(folder: Path) -> dict[str, Case]:
    sizes = {"heads": 4, "kv_heads": 4}
    untied = tiny_model(folder / "untied", layers=3, **sizes)
    tied = tiny_model(folder / "tied", tie=True, **sizes)
    # Thirteen inputs on each of two tp ranks, which two shards cannot divide.
    odd = tiny_model(folder / "odd", intermediate=26, **sizes)
    sample = {
        # Several layers and steps with recomputation: where others deadlock.
        "fsdp x tp, r=3": Case(untied, LAYOUTS["fsdp x tp"], adapter(3), RECOMPUTED, steps=4),
        "fsdp x sp, r=1": Case(odd, LAYOUTS["fsdp x sp"], adapter(1), RECOMPUTED),
        "embedding": Case(untied, LAYOUTS["sp 4"], adapter(3, "embed_tokens", "k_proj", "up_proj")),
        "compiled": Case(untied, LAYOUTS["fsdp x sp"], adapter(2), COMPILED),
        "hsdp, r=1": Case(untied, LAYOUTS["hsdp"], adapter(1)),
        "hsdp x sp, whole": Case(tied, LAYOUTS["hsdp x sp"], None, RECOMPUTED),
        "tp 4, head": Case(untied, LAYOUTS["tp 4"], adapter(2, "lm_head", "o_proj", "v_proj")),
    }
    everything = {
        f"{layout}, {model}, {rank}": Case(
            path, dims, adapter(rank) if rank else None, RECOMPUTED if rank % 2 else {}
        )
        for layout, dims in LAYOUTS.items()
        for model, path in (("tied", tied), ("untied", untied))
        for rank in range(5)
    }
    return everything | sample if FULL else sample


def family_cases(folder: Path) -> dict[str, Case]:
    cases = {}
    for name in CASES if FULL else FAMILIES:
        sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
        directory = str(write_family(folder / name, name, **sizes))
        for layout in LAYOUTS if FULL else ("fsdp x sp",):
            if "4" not in layout:  # two key/value heads
                cases[f"{name}, {layout}"] = Case(directory, LAYOUTS[layout], None, steps=1)
    return cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Case]]:
    folder = tmp_path_factory.mktemp("models")
    return {"layouts": layout_cases(folder), "families": family_cases(folder)}


@pytest.fixture(scope="module")
def ranks(
    cases: dict[str, dict[str, Case]], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What four processes did, by name: starting them takes longer than most of it."""
    plain = tiny_model(tmp_path_factory.mktemp("plain"), heads=4, kv_heads=2)
    calls = {
        "layouts": ("train_all", (cases["layouts"],)),
        "families": ("train_all", (cases["families"],)),
        "styles": ("styles", ([1, 3],)),
        "refused": ("refusals", (plain,)),
        "meshes": ("meshes", (MESHES, 2)),
    }
    return run_ranks(4, ranks_tp.several, calls, timeout=DEADLINE)


@pytest.mark.parametrize("group", ["layouts", "families"])
def test_layouts_compute_what_one_process_does(
    cases: dict[str, dict[str, Case]], ranks: list[dict[str, Any]], group: str
) -> None:
    references: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, case in cases[group].items():
        key = (case.directory, case.lora, case.steps)
        if key not in references:
            references[key] = ranks_tp.train(Case(case.directory, lora=case.lora, steps=case.steps))
        for rank in ranks:
            assert_same(name, case, rank[group][name], references[key])


def test_where_the_factors_lie(ranks: list[dict[str, Any]]) -> None:
    placements = ranks[0]["layouts"]["fsdp x tp, r=3"]["placements"]
    attention = "layers.0.attention"
    # Column: A whole on the tp ranks, B like the base's output. Row: the other way round.
    assert placements[f"{attention}.wq.lora_a.weight"] == "(Shard(dim=1), Replicate())"
    assert placements[f"{attention}.wq.lora_b.weight"].endswith(", Shard(dim=0))")
    assert placements[f"{attention}.wo.lora_a.weight"].endswith(", Shard(dim=1))")
    assert placements[f"{attention}.wo.lora_b.weight"] == "(Shard(dim=0), Replicate())"


def test_styles_need_no_fsdp(ranks: list[dict[str, Any]]) -> None:
    for index, adapter_rank in enumerate((1, 3)):
        alone = ranks_tp.net_step(ranks_tp.net(adapter_rank))
        everywhere = [rank["styles"][index] for rank in ranks]
        for found in everywhere:
            assert close(found["y"], alone["y"])
            assert close(found["x"], alone["x"])
            assert close(found["norm"], alone["norm"])
            # Base and adapter are summed together, and the factors that are whole each once.
            assert found["collectives"] == {"forward": 1, "backward": 1 + 2}
            assert found["partial"] == []
            assert found["state"] == list(ranks_tp.net(1).state_dict())
            assert [kind.__name__ for kind in found["types"]] == ["DTensor"]
            for key in ("grads", "trained"):
                for name, value in alone[key].items():
                    assert close(found[key][name], value), (key, name)
        for name in ("up.lora_a.weight", "down.lora_b.weight"):
            first, *others = (found["replicas"][name] for found in everywhere)
            assert all(torch.equal(first, other) for other in others)


def test_what_cannot_be_split(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        refused = rank["refused"]
        assert refused["dropout"].startswith("LoRAConfigError")
        assert "dropout=0.1 with tensor parallelism" in refused["dropout"]
        assert "a Sequential with dropout=0.1 does not go with" in refused["router"]
        assert "4 ranks cannot be laid out" in refused["world"]
        assert "tp=4 does not divide num_key_value_heads=2 of" in refused["heads"]
        assert "TargetError: the style is for LoRALinear, got Linear" in refused["not adapted"]
        assert "sharded already" in refused["twice"]
        assert "weight of a Linear is a Packed: weights of another kind" in refused["packed"]
        assert "no rule for extra.weight" in refused["no rule"]
        assert "sequence_parallel does not go with pp" in refused["stage"]
        assert "KVCache does not go with sequence parallelism" in refused["cache"]


def test_meshes(ranks: list[dict[str, Any]]) -> None:
    meshes = [rank["meshes"] for rank in ranks]
    fsdp, hsdp, pp_tp, ep, hsdp_ep, tp = meshes[3]
    assert fsdp == {
        **{view: [0, 1, 2, 3] for view in ("fsdp", "dp", "expert_fsdp")},
        **dict.fromkeys(("tp", "pp", "ep")),
        "dims": ("dp_shard",),
        "dp_rank": 3,
    }
    assert hsdp["fsdp"] == [[0, 1], [2, 3]]
    assert (hsdp["dp"], hsdp["dp_rank"]) == ([0, 1, 2, 3], 3)
    assert pp_tp["dims"] == ("pp", "dp_shard", "tp")
    assert (pp_tp["pp"], pp_tp["fsdp"], pp_tp["tp"]) == ([1, 3], [3], [2, 3])
    assert (ep["ep"], ep["expert_fsdp"], ep["fsdp"]) == ([2, 3], [1, 3], [0, 1, 2, 3])
    assert (hsdp_ep["ep"], hsdp_ep["expert_fsdp"]) == ([2, 3], [[1], [3]])
    assert (tp["fsdp"], tp["tp"], tp["dp_rank"]) == ([1, 3], [2, 3], 1)
    assert [rank[5]["dp_rank"] for rank in meshes] == [0, 0, 1, 1]
    for rank in (0, 1):
        part = meshes[rank][6]
        assert (part["tp"], part["fsdp"]) == ([0, 1], [rank])


@pytest.mark.compat
@pytest.mark.skipif(not FULL, reason="four processes import transformers: ARCHON_LAYOUTS=full")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral-window"])
def test_models_of_transformers_are_split_alike(tmp_path: Path, family: str) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    directory = str(write_family(tmp_path, family, **heads))
    alone = ranks_tp.transformers_grads(0, 1, directory)
    for grads in run_ranks(4, ranks_tp.transformers_grads, directory):
        assert grads.keys() == alone.keys()
        for name, value in alone.items():
            assert close(grads[name], value), name
