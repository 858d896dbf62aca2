"""What is published: lints clean for every engine, and never ends a server."""

from __future__ import annotations

import logging

import pytest
import torch
from support.lint_rows import BASE_CONFIG, RANK, ROWS, SHAPES, adapter
from torch import nn

from archon_lora import LoRAConfig, apply_lora, peft_export
from archon_lora.adapter import get_adapter_state_dict
from ckpt.consolidate import export_tensors
from ckpt.errors import PublishError
from ckpt.lint import BaseModel, LintLimits, lint_adapter
from ckpt.lint.gate import _judge
from ckpt.publish import list_versions, publish_version
from ckpt.source import MemorySource
from ckpt.storage import open_storage
from ckpt.types import AdapterExport, TensorRule

LOGGER = "ckpt.lint.gate"


@pytest.fixture(autouse=True)
def forget():
    _judge.cache_clear()


def publish(root, made, **fields):
    return publish_version(
        open_storage(root),
        run="run7",
        export=AdapterExport(
            made.config, tuple(TensorRule(key, key) for key in sorted(made.tensors))
        ),
        source=MemorySource(made.tensors),
        step=1,
        policy_version=None,
        epoch=1,
        attempt="attempt0",
        base=None,
        **fields,
    )


@pytest.mark.parametrize("row", ["k-and-v", "only-up", "rank-pattern-alone"])
def test_what_a_server_dies_of_is_not_published(tmp_path, row):
    with pytest.raises(PublishError, match="sglang would die of it"):
        publish(tmp_path, ROWS[row].build())
    assert list_versions(open_storage(tmp_path)) == []  # and no number was spent


@pytest.mark.parametrize("row", ["portable", "q-and-v", "only-o", "q-k-v"])
def test_a_portable_version_lints_clean_and_says_nothing(tmp_path, caplog, row):
    with caplog.at_level(logging.WARNING, LOGGER):
        version = publish(tmp_path, ROWS[row].build())
    base = BaseModel.from_config(BASE_CONFIG)
    assert lint_adapter(tmp_path / "adapters" / version.name, base=base) == []
    assert caplog.records == []


def test_what_single_engines_get_wrong_is_said_once_and_published(tmp_path, caplog):
    made = ROWS["rslora"].build()
    with caplog.at_level(logging.WARNING, LOGGER):
        for _ in range(3):
            publish(tmp_path, made)
    (record,) = caplog.records
    assert "silently wrong in sglang (rslora)" in record.getMessage()
    assert len(list_versions(open_storage(tmp_path))) == 3


def test_a_rank_above_the_default_limit_is_the_server_s_matter(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, LOGGER):
        version = publish(tmp_path, adapter(rank=24))
    assert caplog.records == []
    directory = tmp_path / "adapters" / version.name
    assert [one.code for one in lint_adapter(directory)] == ["vllm-max-rank"]
    assert lint_adapter(directory, limits=LintLimits(vllm_max_lora_rank=32)) == []


class Layer(nn.Module):
    def __init__(self, shapes):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name, (into, out) in shapes.items():
            parent, _, last = name.partition(".")
            getattr(self, parent).add_module(last, nn.Linear(into, out, bias=False))


class Model(nn.Module):
    """The linear layers of the tiny base under their HuggingFace names."""

    def __init__(self, shapes):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Layer(shapes) for _ in range(2)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_export_of_mixed_ranks_patterns_and_rslora_lints_clean(tmp_path, dtype):
    model = Model(SHAPES)
    config = LoRAConfig(
        rank=RANK,
        alpha=6.0,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"o_proj": 3.0},
        target_modules=[name.rpartition(".")[2] for name in SHAPES],
    )
    apply_lora(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.normal_()
    made = peft_export(model, base_model_name="tiny")
    export = AdapterExport(made["peft_config"], tuple(TensorRule(**rule) for rule in made["rules"]))
    tensors = get_adapter_state_dict(model)
    export_tensors(tensors, export, tmp_path / "out", dtype=dtype)
    base = BaseModel.from_config(BASE_CONFIG)
    assert lint_adapter(tmp_path / "out", base=base) == []
