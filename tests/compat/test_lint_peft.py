"""What ``ckpt lint`` says of PEFT is what PEFT does: every row is loaded and computed with."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.lint_more_rows import MORE
from support.lint_rows import BASE_CONFIG, ROWS, SHAPES, Adapter, adapter

from archon_lora import peft_config as core
from ckpt.lint import BaseModel, Effect
from ckpt.lint.config_rules import PEFT_FIELDS

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.compat,
    # PEFT reads a property that transformers is about to rename.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # These adapters make PEFT warn; what it then computes is what the tests look at.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings(
        "ignore:target_parameters=.* no parameter was matched:RuntimeWarning"
    ),
]

TOKENS = torch.arange(1, 13).view(1, 12)
TOLERANCE = 1e-4


def base_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**{k: v for k, v in BASE_CONFIG.items() if k != "model_type"})
    return transformers.Qwen2ForCausalLM(config).float().eval()


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(TOKENS).logits


def intended(made: Adapter) -> torch.Tensor:
    """Logits of the base with what was trained added by hand."""
    model = base_model()
    with torch.no_grad():
        for name, delta in made.deltas.items():
            model.get_submodule(name).weight += delta
    return logits(model)


def load(directory: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(base_model(), directory).eval()


# What these compute besides A and B is PEFT's own matter; the rest of the table is compared.
OTHER_COMPUTATION = {
    *(
        "bias",
        "dora",
        "kasa",
        "lora-bias",
        "modules-to-save",
        "pissa",
        "saved-embedding",
        "stranger",
    )
}
# Of a module that is not there nothing can be intended; a test of its own is below.
NO_MODULE = "no-such-module"


# Of those without a base, the tiny one is not the model that they are for.
EVERY_ROW = {name: row for name, row in {**ROWS, **MORE}.items() if row.base}
del EVERY_ROW[NO_MODULE]


@pytest.mark.parametrize("name", EVERY_ROW)
def test_peft_does_what_is_said(tmp_path, name):
    row = EVERY_ROW[name]
    made = row.build()
    directory = made.write(tmp_path / made.name)
    if row.peft is Effect.REFUSED:
        with pytest.raises(Exception):  # noqa: B017, PT011 - of any kind: a refusal is what counts
            load(directory)
        return
    got = logits(load(directory))
    want = intended(made)
    if row.peft is Effect.WRONG:
        # The random A that PEFT keeps for a missing one may be near enough to zero nowhere.
        assert not torch.allclose(got, want, atol=100 * TOLERANCE)
    elif name in OTHER_COMPUTATION:
        assert torch.isfinite(got).all()
        assert not torch.allclose(got, logits(base_model()), atol=100 * TOLERANCE)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_a_module_that_is_not_there_is_ignored_or_refused(tmp_path):
    alone = MORE[NO_MODULE].build()
    with pytest.raises(ValueError, match="not found in the base model"):
        load(alone.write(tmp_path / "alone"))
    made = adapter()
    made.tensors |= alone.tensors
    made.config["target_modules"].append("wq")
    got = logits(load(made.write(tmp_path / "beside")))
    torch.testing.assert_close(got, intended(adapter()), rtol=0, atol=TOLERANCE)


def test_the_fields_are_those_of_peft():
    known = {entry.name for entry in dataclasses.fields(peft.LoraConfig)}
    assert known <= PEFT_FIELDS
    assert core.READ | core.IGNORED | set(core.REFUSED) == PEFT_FIELDS


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
)
def test_names_and_shapes_are_those_of_transformers(family):
    sizes = {**BASE_CONFIG, "head_dim": 12, "model_type": family}
    sizes.pop("architectures")
    sizes.pop("model_type")
    config = transformers.AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    base = BaseModel.from_config(json.loads(config.to_json_string(use_diff=False)))
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert len(linears) == 2 * len(SHAPES) + 1
    for name, shape in linears.items():
        assert base.standing(name) == "known"
        assert base.shape_of(name) == shape
