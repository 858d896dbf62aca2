"""Several adapters over one FSDP2-sharded base, on real gloo ranks, against one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import ranks_variants
from support.spawn import run_ranks

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    """Each world trains and saves on a root of its own, and goes on from its own and the other's.

    Every rank's answers by world; the second world runs after the first.
    """
    roots = {world: str(tmp_path_factory.mktemp("roots") / str(world)) for world in (1, 2)}
    compiled = {2: str(tmp_path_factory.mktemp("roots") / "compiled")}
    found = {}
    for world in (1, 2):
        calls: dict[str, tuple[str, tuple]] = {
            "train": ("train", (roots[world], False)),
            "resume": ("resume", (roots[world],)),
        }
        if world == 2:
            calls["other"] = ("resume", (roots[1],))
            calls["compiled"] = ("train", (compiled[2], True))
            calls["mixed"] = ("mixed", ())
        found[world] = run_ranks(world, ranks_variants.scenarios, calls, timeout=240)
    (config,) = Path(roots[2], "adapters").rglob("adapter_config.json")
    for answers in found[2]:
        answers["config"] = json.loads(config.read_text())
    return found


def close(left: dict, right: dict, tolerance: float = 2e-6) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(right[name]), rtol=0, atol=tolerance
        )


def test_each_mode_computes_on_shards_what_it_does_in_one_process(results: dict) -> None:
    (one,) = results[1]
    for answers in results[2]:
        for kind in ("train", "compiled"):
            close(answers[kind]["before"], one["train"]["before"], 1e-5)
    assert len({str(values) for values in one["train"]["before"].values()}) == 4


def test_only_the_active_adapter_gets_gradients_and_training_agrees(results: dict) -> None:
    (one,) = results[1]
    for answers in results[2]:
        for kind in ("train", "compiled"):
            got = answers[kind]
            assert got["used"] == [["default"], ["other"], ["default"]]
            close(got["saved"], one["train"]["saved"])
            close(got["after"], one["train"]["after"])
    saved, after = one["train"]["saved"], one["train"]["after"]
    for name, values in saved.items():
        assert (values == after[name]) == ("reference" in name), name


def test_toggling_compiled_blocks_under_fsdp_makes_a_bounded_number_of_graphs(
    results: dict,
) -> None:
    for answers in results[2]:
        first, repeated = answers["compiled"]["graphs"]
        # Two blocks, each with the policy, the other adapter, the reference, and the base.
        assert 4 <= first <= 8
        assert repeated == 0


@pytest.mark.parametrize("world", [1, 2])
def test_a_resume_brings_every_adapter_and_goes_on_exactly(results: dict, world: int) -> None:
    for answers in results[world]:
        assert answers["resume"]["restored"] == answers["train"]["saved"]
        assert answers["resume"]["after"] == answers["train"]["after"]


def test_a_step_of_one_rank_goes_on_on_two(results: dict) -> None:
    (one,) = results[1]
    for answers in results[2]:
        assert answers["other"]["restored"] == one["train"]["saved"]
        close(answers["other"]["after"], one["train"]["after"])


def test_a_copy_works_on_shards_and_changes_of_the_set_do_not(results: dict) -> None:
    for answers in results[2]:
        assert answers["train"]["copied"]
        assert [text.partition(" ")[0] for text in answers["train"]["refused"]] == [
            "add_adapter()",
            "remove_adapter()",
        ]


def test_a_version_holds_the_adapter_that_was_named(results: dict) -> None:
    config = results[2][0]["config"]
    assert config["target_modules"] == ["down", "output"]
    assert config["r"] == config["lora_alpha"] == 1


def test_over_a_bf16_base_factors_multiply_in_bf16_and_are_kept_in_fp32(results: dict) -> None:
    for answers in results[2]:
        assert answers["mixed"] == {
            "outputs": ["torch.bfloat16"],
            "multiplied": ["torch.bfloat16"],
            "stored": ["torch.float32"],
            "gradients": ["torch.float32"],
        }
