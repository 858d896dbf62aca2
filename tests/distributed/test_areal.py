"""The AReaL plug-in on two real ranks, over a stand-in for AReaL's engine and rollout client."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks_areal
from support.spawn import run_ranks

from archon_lora.models.tiny import write_tiny_qwen2
from ckpt.peft import read_adapter

pytestmark = pytest.mark.dist

Results = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks' answers, and where they wrote."""
    root = tmp_path_factory.mktemp("areal")
    model = root / "model"
    write_tiny_qwen2(str(model))
    answers = run_ranks(2, ranks_areal.everything, model, root, timeout=180)
    return root, answers  # type: ignore[return-value]  # what everything() returns


def of(results: Results, part: str) -> list[dict[str, Any]]:
    return [answers[part] for answers in results[1]]


def test_adapters_are_initialised_after_materialisation_and_alone_in_the_optimizer(
    results: Results,
) -> None:
    for rank in of(results, "training"):
        assert rank["finite"], "memory after to_empty() holds anything"
        assert all(bool(v.any()) == ("lora_a" in n) for n, v in rank["first"].items())
        assert rank["optimised"] == len(rank["first"]) > 0
        assert rank["base_frozen"]
    first, second = of(results, "training")
    assert all(torch.equal(first["first"][n], second["first"][n]) for n in first["first"])


def test_a_recovered_run_goes_on_bit_for_bit_at_its_version(results: Results) -> None:
    for rank in of(results, "training"):
        assert rank["resumed"] == rank["went_on"]
        assert (rank["version"], rank["base_version"]) == (2, 2)
        assert "onload" in rank["calls"], "AReaL brings offloaded memory back around a save"


def test_save_writes_a_peft_adapter_that_load_takes(results: Results) -> None:
    config, tensors = read_adapter(results[0] / "training/peft")
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["r"], config["lora_alpha"]) == (3, 6)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert all(rank["loaded_same"] for rank in of(results, "training"))


def test_a_save_that_goes_past_the_engine_is_an_error_and_not_a_lost_adapter(
    results: Results,
) -> None:
    for rank in of(results, "training"):
        assert "saver.mode: sync" in rank["trapped"]
    assert not (results[0] / "training/bypass").exists()
    assert read_adapter(results[0] / "training/saver")


def test_each_version_is_loaded_while_paused_from_a_directory_of_its_own(results: Results) -> None:
    first, second = of(results, "updates")
    names = [name for name, _, _ in first["loaded"]]
    assert names == ["lora-v0", "lora-v1", "lora-v2", "lora-v3", "lora-v5"]
    paths = [path for _, path, _ in first["loaded"]]
    assert len(set(paths)) == 5
    assert all(paused for _, _, paused in first["loaded"])
    assert second["loaded"] == []
    assert first["calls"] == second["calls"] == "areal.destroy"


def test_a_version_that_was_handed_over_stays_as_it_was_loaded(results: Results) -> None:
    first = of(results, "updates")[0]
    path = Path(first["loaded"][-1][1])
    _, tensors = read_adapter(path)
    assert all(torch.equal(tensors[k], first["last"][k]) for k in first["last"])
    assert (path / "MANIFEST.json").is_file()


def test_an_update_that_fails_lets_generation_go_on_with_the_version_before(
    results: Results,
) -> None:
    for rank in of(results, "updates"):
        assert "a replica is gone" in rank["errors"]["failed"]
        assert rank["after_failure"] == (3, False)


def test_versions_in_use_are_leased_and_older_ones_given_up(results: Results) -> None:
    leased = of(results, "updates")[0]["leased"]
    held = [name for name, count in leased.items() if count]
    assert len(held) == 2, "in_flight"
    assert held == sorted(leased)[-2:]
    assert not any(
        path.is_file() for path in (results[0] / "updates/versions/leases").rglob("*.json")
    ), "given back by destroy()"


@pytest.mark.parametrize(
    ("kind", "said"),
    [("again", "comes after 5"), ("xccl", "weight_update_mode: disk"), ("whole", "use_lora=True")],
)
def test_an_update_that_cannot_be_one_is_refused(results: Results, kind: str, said: str) -> None:
    for rank in of(results, "updates"):
        assert said in rank["errors"][kind]


def test_without_a_root_areals_own_directory_is_used(results: Results) -> None:
    first = of(results, "plain")[0]
    assert first["loaded"] == [("lora-v1", "weight_update_v1", True)]
    assert first["deleted"], "by AReaL, whose directory it is"
    # The serving form: the scaling 6 / 3 is folded into B.
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    live = first["adapter"]["layers.0.attention.wq.lora_b.weight"]
    assert torch.equal(first["tensors"][name], live * 2)
    assert live.any()


def test_stages_of_a_pipeline_save_one_adapter_for_any_layout(results: Results) -> None:
    first, second = of(results, "pipeline")
    assert not set(first["names"]) & set(second["names"])
    assert sorted([*first["names"], *second["names"]]) == first["whole"]
    for rank in (first, second):
        assert rank["resumed"]
        assert rank["resharded"], "two stages, loaded as two shards"
    _, tensors = read_adapter(results[0] / "pipeline/peft")
    assert len(tensors) == len(first["whole"])
    assert first["loaded"].keys() == tensors.keys(), "the version, too, is of all stages"


def test_tensor_parallel_ranks_train_what_one_rank_trains(results: Results) -> None:
    for rank in of(results, "tensor"):
        for (loss, norm), (want_loss, want_norm) in zip(
            rank["trained"], rank["expected"], strict=True
        ):
            assert loss == pytest.approx(want_loss, abs=2e-6)
            assert norm == pytest.approx(want_norm, rel=1e-4)
        assert rank["worst"] < 1e-4 < rank["moved"]
        assert rank["resumed"][0] == rank["resumed"][1]
        assert rank["resharded"]
        assert rank["restored_style"], "torch's styles are AReaL's again"
        assert rank["trains"] == 2 * 7 * 2, "torch's own styles make norms trainable"
    assert read_adapter(results[0] / "tensor/peft")[0]["r"] == 3


@pytest.mark.skipif(os.environ.get("ARCHON_LAYOUTS") != "full", reason="four ranks: make layouts")
def test_two_by_two_neither_hangs_nor_differs(tmp_path: Path) -> None:
    for rank in run_ranks(4, ranks_areal.four_ranks, tmp_path, timeout=150):
        assert isinstance(rank, dict)
        assert rank["losses"] == pytest.approx(rank["expected"], abs=2e-6)
        assert rank["worst"] < 1e-4
        assert rank["resharded"]


def test_factors_lie_beside_what_their_base_splits(results: Results) -> None:
    placements = of(results, "tensor")[0]["placements"]
    column, row = "layers.0.attention.wq", "layers.0.attention.wo"
    assert placements[f"{column}.lora_a.weight"].endswith("Replicate())")
    assert "Shard(dim=0))" in placements[f"{column}.lora_b.weight"]
    assert placements[f"{row}.lora_a.weight"].endswith("Shard(dim=1))")
    assert placements[f"{row}.lora_b.weight"].endswith("Replicate())")


def test_without_lora_everything_is_areals_own(results: Results) -> None:
    for rank in of(results, "without"):
        assert "areal.update_weights" in rank["calls"]
        assert rank["adapter"] == "StateDictAdapter"
        assert rank["trains"]
        assert rank["version"] == 3
    assert (results[0] / "without/whole/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("critic", "value head"),
        ("peft", "peft_type must be 'lora'"),
        ("stage", "hold no adapted module"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_built(
    results: Results, what: str, said: str
) -> None:
    for rank in of(results, "refused"):
        assert said in rank[what]
