"""LoRAConfig: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch

from archon_lora import LoRAConfig, LoRAConfigError
from archon_lora.peft_config import REFUSED

REFUSALS = [
    ({"rank": 0}, "rank must be an integer >= 1, got 0"),
    ({"rank": -4}, "rank must be an integer >= 1, got -4"),
    ({"rank": True}, "rank must be an integer >= 1, got True"),
    ({"rank": 8.0}, "rank must be an integer >= 1, got 8.0"),
    ({"rank": "8"}, "rank must be an integer >= 1, got '8'"),
    ({"alpha": "abc"}, "alpha must be a finite number > 0, got 'abc'"),
    ({"alpha": 0}, "alpha must be a finite number > 0, got 0"),
    ({"alpha": -1.0}, "alpha must be a finite number > 0, got -1.0"),
    ({"alpha": math.nan}, "alpha must be a finite number > 0, got nan"),
    ({"alpha": math.inf}, "alpha must be a finite number > 0, got inf"),
    ({"alpha": True}, "alpha must be a finite number > 0, got True"),
    ({"alpha": None}, "alpha must be a finite number > 0, got None"),
    ({"dropout": 1.5}, "dropout must be a number >= 0 and < 1, got 1.5"),
    ({"dropout": 1.0}, "dropout must be a number >= 0 and < 1, got 1.0"),
    ({"dropout": -0.1}, "dropout must be a number >= 0 and < 1, got -0.1"),
    ({"dropout": math.nan}, "dropout must be a number >= 0 and < 1, got nan"),
    ({"dropout": "0"}, "dropout must be a number >= 0 and < 1, got '0'"),
    ({"target_modules": []}, "target_modules must name at least one module, got ()"),
    ({"target_modules": ""}, "target_modules must name at least one module, got ''"),
    ({"target_modules": ["q_proj", 3]}, "target_modules must hold names that are not empty, got 3"),
    ({"target_modules": [""]}, "target_modules must hold names that are not empty, got ''"),
    ({"target_modules": None}, "target_modules must be a list of names or a regular expression"),
    ({"target_modules": "(q_proj"}, "target_modules '(q_proj' must be a valid regular expression"),
    ({"exclude_modules": "*"}, "exclude_modules '*' must be a valid regular expression"),
    ({"exclude_modules": "all-linear"}, "exclude_modules must be a list or a regular expression"),
    ({"exclude_modules": 1}, "exclude_modules must be a list of names or a regular expression"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q'] must be an integer >= 1, got 0"),
    ({"rank_pattern": {"q": -2}}, "rank_pattern['q'] must be an integer >= 1, got -2"),
    ({"rank_pattern": {"q(": 2}}, "rank_pattern key 'q(' must be a valid regular expression"),
    ({"rank_pattern": {"": 2}}, "rank_pattern must have regular expressions as keys, got ''"),
    ({"rank_pattern": ["q"]}, "rank_pattern must map regular expressions to numbers, got ['q']"),
    ({"alpha_pattern": {"q": "x"}}, "alpha_pattern['q'] must be a finite number > 0, got 'x'"),
    ({"alpha_pattern": {3: 1}}, "alpha_pattern must have regular expressions as keys, got 3"),
    ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
    ({"init": "pissa"}, "init must be one of 'kaiming', 'gaussian', got 'pissa'"),
    ({"adapter_dtype": torch.int8}, "adapter_dtype must be one of float32, fp32"),
    ({"adapter_dtype": "float8"}, "adapter_dtype must be one of float32, fp32"),
    ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ({"seed": 1.0}, "seed must be an integer >= 0, got 1.0"),
]


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=lambda v: str(v)[:40])
def test_refusals_say_what_was_given_and_what_is_wanted(values: dict, message: str) -> None:
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig(**values)
    assert message in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(LoRAConfigError, match=r"unknown LoRA setting: lora_rnk; known are rank,"):
        LoRAConfig.from_mapping({"rank": 4, "lora_rnk": 8})
    made = LoRAConfig.from_mapping({"rank": 4, "adapter_dtype": "bf16"})
    assert made == LoRAConfig(rank=4, adapter_dtype=torch.bfloat16)


def test_is_frozen_hashable_and_picklable() -> None:
    config = LoRAConfig(
        target_modules=["q_proj", "q_proj", "v_proj"], rank_pattern={"a": 1}, alpha_pattern={"b": 2}
    )
    assert config.target_modules == ("q_proj", "v_proj")
    assert hash(config) == hash(pickle.loads(pickle.dumps(config)))
    assert config == pickle.loads(pickle.dumps(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        config.rank_pattern["a"] = 9  # type: ignore[index]
    # Of two patterns that match, the first wins, so the order is part of the value.
    assert LoRAConfig(rank_pattern={"a": 1, "b": 2}) != LoRAConfig(rank_pattern={"b": 2, "a": 1})


def test_given_mappings_can_change_afterwards_without_effect() -> None:
    ranks = {"q_proj": 4}
    config = LoRAConfig(rank_pattern=ranks)
    ranks["q_proj"] = -1
    assert config.rank_for("model.q_proj") == 4


def test_rank_alpha_and_scaling_by_name() -> None:
    config = LoRAConfig(
        rank=16,
        alpha=32,
        rank_pattern={r"layers\.1\.q_proj": 4, "q_proj": 8},
        alpha_pattern={"q_proj": 8},
    )
    assert config.rank_for("model.layers.1.q_proj") == 4
    assert config.rank_for("model.layers.0.q_proj") == 8
    assert config.rank_for("q_proj") == 8
    assert config.rank_for("xq_proj") == 16, "a key matches after a dot or from the start"
    assert config.rank_for("q_proj.inner") == 16
    assert config.scaling_for("model.layers.1.q_proj") == 2.0
    assert config.scaling_for("v_proj") == 2.0
    stabilised = dataclasses.replace(config, use_rslora=True)
    assert stabilised.scaling_for("model.layers.1.q_proj") == 4.0
    assert stabilised.scaling_for("v_proj") == 8.0


TRAIN = {
    "use_lora": True,
    "lora_rank": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj"],
    "peft_type": "lora",
}


@pytest.mark.parametrize("form", [dict, lambda d: SimpleNamespace(**d, other=1)])
def test_train_config_as_mapping_or_object(form) -> None:
    config = LoRAConfig.from_train_config(form(TRAIN))
    assert config == LoRAConfig(rank=8, alpha=16, target_modules=("q_proj",))
    assert LoRAConfig.from_train_config(form({**TRAIN, "use_lora": False})) is None
    for targets in ([], None, ["all-linear"], ("all-linear",), "all-linear"):
        every = LoRAConfig.from_train_config(form({**TRAIN, "target_modules": targets}))
        assert every == LoRAConfig(rank=8, alpha=16, target_modules="all-linear")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": "abc"}, "lora_alpha must be a finite number > 0, got 'abc'"),
        ({"lora_rank": 0}, "lora_rank must be an integer >= 1, got 0"),
        ({"lora_rank": None}, "lora_rank must be given (an integer >= 1), got null"),
        ({"peft_type": "dora"}, "peft_type must be 'lora', got 'dora'"),
        ({"use_lora": "yes"}, "use_lora must be true or false, got 'yes'"),
        ({"lora_dropot": 0.1}, "unknown field of a training config's LoRA part: lora_dropot"),
        ({"target_modules": 5}, "target_modules must be a list of names or a regular expression"),
    ],
)
def test_train_config_refusals(change: dict, message: str) -> None:
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig.from_train_config({**TRAIN, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["use_lora", "lora_rank", "lora_alpha"])
def test_train_config_needs_its_fields(name: str) -> None:
    values = {k: v for k, v in TRAIN.items() if k != name}
    with pytest.raises(LoRAConfigError, match=f"{name} must be given .* got nothing"):
        LoRAConfig.from_train_config(values)
    with pytest.raises(LoRAConfigError, match=f"{name} must be given .* got nothing"):
        LoRAConfig.from_train_config(SimpleNamespace(**values))


def test_peft_round_trip_through_json() -> None:
    config = LoRAConfig(
        rank=4,
        alpha=6.5,
        dropout=0.1,
        target_modules=("q_proj", "v_proj"),
        exclude_modules=r".*\.3\..*",
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 3.0},
        use_rslora=True,
        init="gaussian",
    )
    written = json.loads(json.dumps(config.to_peft(base_model_name="org/base")))
    assert LoRAConfig.from_peft(written) == config
    assert written["base_model_name_or_path"] == "org/base"
    assert written["peft_type"] == "LORA"
    assert written["lora_alpha"] == 6.5
    assert list(written) == sorted(written)
    # Engines declare lora_alpha an integer.
    assert isinstance(LoRAConfig(alpha=32.0).to_peft()["lora_alpha"], int)


PEFT = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True is not supported: DoRA's row norms need whole rows"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported"),
        ({"layers_to_transform": [0]}, "layers_to_transform=[0] is not supported"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
        ({"target_parameters": ["w"]}, "target_parameters=['w'] is not supported"),
        ({"use_qalora": True}, "use_qalora=True is not supported"),
        ({"loftq_config": {"bits": 4}}, "loftq_config={'bits': 4} is not supported"),
        ({"use_newlora": True}, "unknown PEFT field 'use_newlora'=True"),
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', got 'IA3'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be true or 'gaussian'"),
        ({"init_lora_weights": False}, "init_lora_weights must be true or 'gaussian', got False"),
        ({"task_type": "SEQ_CLS"}, "task_type must be 'CAUSAL_LM' or null, got 'SEQ_CLS'"),
        ({"lora_alpha": None}, "lora_alpha must be given (a number > 0), got null"),
        ({"lora_alpha": "abc"}, "lora_alpha must be a finite number > 0, got 'abc'"),
        ({"r": 0}, "r must be an integer >= 1, got 0"),
        ({"target_modules": None}, "target_modules must be given"),
    ],
)
def test_peft_configs_that_compute_something_else_are_refused(change: dict, message: str) -> None:
    with pytest.raises(LoRAConfigError) as caught:
        LoRAConfig.from_peft({**PEFT, **change})
    assert message in str(caught.value)


def test_peft_fields_that_are_off_or_informational_are_accepted() -> None:
    accepted = {
        **PEFT,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "loftq_config": {},
        "some_option_of_a_later_release": None,
        "peft_version": "0.99",
        "revision": "main",
        "megatron_core": "megatron.core",
        "task_type": "CAUSAL_LM",
    }
    assert LoRAConfig.from_peft(accepted) == LoRAConfig(
        rank=8, alpha=16, target_modules=("q_proj",)
    )
    with pytest.raises(LoRAConfigError, match="must be a mapping, got list"):
        LoRAConfig.from_peft([])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["use_dora", "lora_bias", "modules_to_save"])
def test_what_is_refused_on_purpose_is_told_with_the_reason(name: str) -> None:
    reason = re.escape(f"{name}=True is not supported: {REFUSED[name]}")
    with pytest.raises(LoRAConfigError, match=reason):
        LoRAConfig.from_mapping({"rank": 4, name: True})
    with pytest.raises(LoRAConfigError, match=reason):
        LoRAConfig.from_peft({**LoRAConfig().to_peft(), name: True})
