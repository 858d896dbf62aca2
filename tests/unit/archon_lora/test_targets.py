"""Which modules are chosen, and the words for entries that choose none."""

from __future__ import annotations

import pytest

from archon_lora import LoRAConfig, TargetError
from archon_lora.targets import head_names, match_targets, router_names, target_names

LINEAR = [
    *(f"model.layers.{i}.self_attn.{p}" for i in (0, 1) for p in ("q_proj", "k_proj", "o_proj")),
    *(f"model.layers.{i}.mlp.{p}" for i in (0, 1) for p in ("gate_proj", "up_proj")),
    "lm_head",
]
NAMES = ["", "model", "model.embed_tokens", "model.layers.0.self_attn", *LINEAR]


def match(**settings: object) -> tuple[str, ...]:
    return match_targets(
        LoRAConfig(**settings), NAMES, linear_names=LINEAR, output_names=["lm_head"]
    )


def test_list_entries_match_a_name_or_its_end_after_a_dot() -> None:
    assert match(target_modules=["q_proj"]) == (LINEAR[0], LINEAR[3])
    assert match(target_modules=["model.layers.1.mlp.up_proj"]) == ("model.layers.1.mlp.up_proj",)
    assert match(target_modules=["lm_head"]) == ("lm_head",)


def test_a_regular_expression_must_match_the_whole_name() -> None:
    assert match(target_modules=r".*\.0\..*q_proj") == (LINEAR[0],)
    with pytest.raises(TargetError, match=r"match a whole name, such as 'model.*\['q_proj'\]"):
        match(target_modules="q_proj")


def test_all_linear_leaves_the_head_out() -> None:
    assert match(target_modules="all-linear") == tuple(LINEAR[:-1])
    assert match(target_modules="All-Linear") == tuple(LINEAR[:-1])


def test_all_linear_leaves_routers_out_but_not_projections_called_gate() -> None:
    names = ["moe.gate", "moe.experts", "moe.shared_expert_gate", "moe.router.gate", "mlp.gate"]
    assert router_names(names) == {"moe.gate", "moe.shared_expert_gate", "moe.router.gate"}
    chosen = match_targets(LoRAConfig(), names, linear_names=[n for n in names if "exp" not in n])
    assert chosen == ("mlp.gate",)
    # By name they can be had.
    assert match_targets(LoRAConfig(target_modules=["moe.gate"]), names, linear_names=names) == (
        "moe.gate",
    )


def test_exclusions_win_in_both_forms() -> None:
    assert match(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]) == (
        LINEAR[3],
    )
    assert match(exclude_modules=r".*self_attn.*|.*gate_proj") == (
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["proj"]}, "target_modules entry 'proj' is for no module"),
        (
            {"target_modules": ["q_proj", "qproj"]},
            "target_modules entry 'qproj' is for no module; did you mean 'q_proj'",
        ),
        (
            {"target_modules": ["all-linear"]},
            "give 'all-linear' as a string, not in a list",
        ),
        ({"target_modules": ["zzz"]}, "there are model, embed_tokens"),
        (
            {"target_modules": r"layers\.\d+\.q_proj"},
            "must match a whole name, such as 'model.layers.",
        ),
        (
            {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
            "entry 'up_proj' selects only modules that exclude_modules leaves out",
        ),
        (
            {"exclude_modules": ["v_proj"]},
            "exclude_modules entry 'v_proj' is for no module",
        ),
        ({"exclude_modules": ".*"}, "selects no module"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 2}},
            "rank_pattern key 'k_proj' is for none of the adapted modules",
        ),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"qproj": 2}},
            "alpha_pattern key 'qproj' is for none of the adapted modules; did you mean 'q_proj'",
        ),
    ],
)
def test_entries_that_choose_nothing_are_named(settings: dict, message: str) -> None:
    with pytest.raises(TargetError) as caught:
        match(**settings)
    assert message in str(caught.value)


def test_all_entries_that_are_for_no_module_are_named_at_once() -> None:
    with pytest.raises(TargetError) as caught:
        match(target_modules=["qproj", "q_proj", "zzz"], exclude_modules=["v_proj"])
    for entry in ("exclude_modules entry 'v_proj'", "target_modules entry 'qproj'", "'zzz'"):
        assert f"{entry} is for no module; " in str(caught.value)
    assert "'q_proj' is" not in str(caught.value)


def test_names_that_are_numbers_are_shown_where_there_are_no_others() -> None:
    with pytest.raises(TargetError, match=r"'q_proj' is for no module; there are 0, 1, 2$"):
        match_targets(LoRAConfig(target_modules=["q_proj"]), ["0", "1", "2"], linear_names=["0"])


def test_heads_by_convention() -> None:
    assert head_names(["output", "text.lm_head", "attn.output", "lm_head", "xlm_head"]) == {
        "output",
        "text.lm_head",
        "lm_head",
    }


def test_target_names_are_suffixes_only_while_those_are_exact() -> None:
    assert target_names(match(target_modules=["q_proj", "up_proj"]), NAMES) == [
        "q_proj",
        "up_proj",
    ]
    assert target_names([LINEAR[0]], NAMES) == [LINEAR[0]]
