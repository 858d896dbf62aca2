"""Qwen3.5's names: those of the modules that transformers builds, and where PEFT puts adapters."""

from __future__ import annotations

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.families import fused_experts
from torch import nn
from transformers import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
)

from archon_lora import (
    LoRAConfig,
    apply_lora,
    get_adapter_params,
    get_adapter_state_dict,
    iter_merged_weights,
    load_adapter_tensors,
    peft_export,
)
from archon_lora.errors import ModelLoadError, UnmappedName
from archon_lora.models.experts import GroupedExperts
from archon_lora.models.qwen3_5_names import Qwen3_5Layers, Qwen3_5StateDictAdapter
from ckpt.consolidate import export_tensors
from ckpt.lint import BaseModel, lint_adapter
from ckpt.train_state import export_of

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 32,
}
DENSE = {"intermediate_size": 24}
SPARSE = {
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
}
VISION = {
    "depth": 1,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 16,
    "num_position_embeddings": 4,
}
KINDS = {
    "dense": (Qwen3_5ForCausalLM, Qwen3_5TextConfig, TEXT | DENSE),
    "moe": (Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, TEXT | SPARSE),
    "dense-composite": (
        Qwen3_5ForConditionalGeneration,
        Qwen3_5Config,
        {"text_config": TEXT | DENSE, "vision_config": VISION},
    ),
    "moe-composite": (
        Qwen3_5MoeForConditionalGeneration,
        Qwen3_5MoeConfig,
        {"text_config": TEXT | SPARSE, "vision_config": VISION},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def directory(kind, tmp_path_factory):
    """What transformers writes, every weight random."""
    cls, config_cls, values = KINDS[kind]
    torch.manual_seed(4)
    model = cls(config_cls(**values))
    out = tmp_path_factory.mktemp("qwen3_5")
    model.save_pretrained(out)
    return out


@pytest.fixture
def adapter(kind, directory):
    config = Qwen3_5Layers.from_hf(directory)
    assert config.layer_types == (*("linear_attention",) * 3, "full_attention")
    return Qwen3_5StateDictAdapter(config, composite="composite" in kind)


@pytest.fixture
def stored(directory):
    """The language model's tensors."""
    tensors = load_file(directory / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if ".visual." not in name}


def test_every_name_goes_both_ways(kind, adapter, stored):
    ours = adapter.from_hf(stored)
    assert ours["layers.3.attention.wq.weight"].shape == (2 * 2 * 8, 16)  # query and gate
    assert ours["layers.0.linear_attn.in_proj_qkv.weight"].shape == (8 + 8 + 16, 16)
    assert "layers.0.linear_attn.A_log" in ours
    if "moe" in kind:
        assert ours["layers.2.moe.experts.w2"].shape == (3, 16, 8)
        assert ours["layers.2.moe.shared_experts.w1.weight"].shape == (12, 16)
        assert ours["layers.2.moe.shared_expert_gate.weight"].shape == (1, 16)
    back = adapter.to_hf(ours)
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in stored.items())
    assert adapter.from_hf_name("mtp.layers.0.mlp.gate.weight") is None
    with pytest.raises(UnmappedName):
        adapter.from_hf_name("model.layers.0.linear_attn.in_proj_x.weight")


def archon_tree(weights: dict[str, torch.Tensor], linear: set[str]) -> nn.Module:
    """Modules with Archon's names that hold the weights; they compute nothing."""
    root = nn.Module()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path[:-1]:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        fqn = ".".join(path)
        if path[-1] == "experts":
            if "experts" not in module._modules:
                experts, width, hidden = weights[f"{fqn}.w1"].shape
                module.add_module("experts", GroupedExperts(experts, hidden, width))
            with torch.no_grad():
                module.get_submodule("experts").get_parameter(last).copy_(tensor)
            continue
        if path[-1] not in module._modules:
            made = nn.Linear(*reversed(tensor.shape), bias=False) if fqn in linear else nn.Module()
            module.add_module(path[-1], made)
        module.get_submodule(path[-1]).register_parameter(last, nn.Parameter(tensor.clone()))
    return root


def test_an_adapter_on_everything_is_where_peft_puts_it(kind, directory, adapter, stored, tmp_path):
    ours = adapter.from_hf(stored)
    linear = set(adapter._written_out(adapter.to_peft_module_map()))
    model = archon_tree(ours, linear)
    lora = LoRAConfig(rank=2, alpha=4)
    record = apply_lora(model, lora, name_map=adapter.module_to_hf)
    names = record.target_names()
    assert sorted(record.matched) == sorted(
        name for name in linear if name != "output" and "gate" not in name.rpartition(".")[2]
    )
    prefix = "model.language_model." if "composite" in kind else "model."
    assert all(name.startswith(f"{prefix}layers.") for name in names)
    assert f"{prefix}layers.0.linear_attn.in_proj_a" in names
    described = adapter.create_peft_adapter_config(lora, "base")
    assert peft_export(model)["peft_config"]["target_modules"] == described["target_modules"]

    with torch.no_grad():
        for index, (name, parameter) in enumerate(get_adapter_params(model).items()):
            if "lora_b" in name:
                torch.manual_seed(index)
                parameter.copy_(torch.randn(parameter.shape))
    # transformers computes these experts with stacked weights, and PEFT wants them so.
    form = "stacked" if "moe" in kind else "single"
    export = export_of(peft_export(model, experts=form))
    export_tensors(get_adapter_state_dict(model), export, tmp_path / "out", dtype="float32")
    cls = KINDS[kind][0]
    theirs = PeftModel.from_pretrained(cls.from_pretrained(directory), tmp_path / "out")
    merged = dict(theirs.merge_and_unload().named_parameters())
    wanted = fused_experts(adapter.to_hf({**ours, **dict(iter_merged_weights(model))}))
    assert {name for name in merged if ".visual." not in name} == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=1e-5, msg=name)

    again = archon_tree(ours, linear)
    apply_lora(again, lora, name_map=adapter.module_to_hf)
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    load_adapter_tensors(again, tensors, written)
    for name, value in get_adapter_state_dict(again).items():
        torch.testing.assert_close(value, get_adapter_state_dict(model)[name])

    saved = adapter.to_hf(get_adapter_state_dict(model))
    assert all(name.startswith(f"base_model.model.{prefix}layers.") for name in saved)
    back = adapter.from_hf(saved)
    assert back.keys() == get_adapter_state_dict(model).keys()


def test_peft_drops_experts_that_come_one_by_one_and_lint_says_so(tmp_path):
    cls, config_cls, values = KINDS["moe"]
    torch.manual_seed(4)
    base = cls(config_cls(**values))
    base.save_pretrained(tmp_path / "base")
    adapter = Qwen3_5StateDictAdapter(Qwen3_5Layers.from_hf(tmp_path / "base"))
    weights = adapter.from_hf(load_file(tmp_path / "base" / "model.safetensors"))
    model = archon_tree(weights, set(adapter._written_out(adapter.to_peft_module_map())))
    apply_lora(model, LoRAConfig(rank=2), name_map=adapter.module_to_hf)
    with torch.no_grad():
        for parameter in get_adapter_params(model).values():
            parameter.fill_(0.5)
    export = export_of(peft_export(model))
    export_tensors(get_adapter_state_dict(model), export, tmp_path / "out", dtype="float32")
    loaded = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out")
    merged = dict(loaded.merge_and_unload().named_parameters())
    stack = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(merged[stack], dict(base.named_parameters())[stack])
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    found = lint_adapter(tmp_path / "out", base=BaseModel.from_config(config))
    assert "moe-experts-single" in {finding.code for finding in found if finding.engine == "peft"}


def test_other_configurations_are_refused():
    with pytest.raises(ModelLoadError, match="must be qwen3_5_text or qwen3_5_moe_text"):
        Qwen3_5Layers.from_hf({"model_type": "qwen3"})
    with pytest.raises(ModelLoadError, match="layer_types must be 2 of"):
        Qwen3_5Layers(num_hidden_layers=2, layer_types=("linear_attention",))
    plain = {"model_type": "qwen3_5_text", "num_hidden_layers": 4}
    assert Qwen3_5Layers.from_hf(plain).layer_types[3] == "full_attention"
