import re

import pytest
import torch

from archon_lora import LoRAConfig, apply_lora
from archon_lora.errors import AdapterMismatch, ModelLoadError, TargetError, UnmappedName
from archon_lora.models.base import template_of
from archon_lora.models.qwen2 import Qwen2Config, Qwen2Model, Qwen2StateDictAdapter

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LAYER = "base_model.model.model.layers"

SIXTEEN = {
    "layers.{}.attention.wq.lora_a.weight": LAYER + ".{}.self_attn.q_proj.lora_A.weight",
    "layers.{}.attention.wq.lora_b.weight": LAYER + ".{}.self_attn.q_proj.lora_B.weight",
    "layers.{}.attention.wk.lora_a.weight": LAYER + ".{}.self_attn.k_proj.lora_A.weight",
    "layers.{}.attention.wk.lora_b.weight": LAYER + ".{}.self_attn.k_proj.lora_B.weight",
    "layers.{}.attention.wv.lora_a.weight": LAYER + ".{}.self_attn.v_proj.lora_A.weight",
    "layers.{}.attention.wv.lora_b.weight": LAYER + ".{}.self_attn.v_proj.lora_B.weight",
    "layers.{}.attention.wo.lora_a.weight": LAYER + ".{}.self_attn.o_proj.lora_A.weight",
    "layers.{}.attention.wo.lora_b.weight": LAYER + ".{}.self_attn.o_proj.lora_B.weight",
    "layers.{}.feed_forward.w1.lora_a.weight": LAYER + ".{}.mlp.gate_proj.lora_A.weight",
    "layers.{}.feed_forward.w1.lora_b.weight": LAYER + ".{}.mlp.gate_proj.lora_B.weight",
    "layers.{}.feed_forward.w3.lora_a.weight": LAYER + ".{}.mlp.up_proj.lora_A.weight",
    "layers.{}.feed_forward.w3.lora_b.weight": LAYER + ".{}.mlp.up_proj.lora_B.weight",
    "layers.{}.feed_forward.w2.lora_a.weight": LAYER + ".{}.mlp.down_proj.lora_A.weight",
    "layers.{}.feed_forward.w2.lora_b.weight": LAYER + ".{}.mlp.down_proj.lora_B.weight",
    "output.lora_a.weight": "base_model.model.lm_head.lora_A.weight",
    "output.lora_b.weight": "base_model.model.lm_head.lora_B.weight",
}

HF_LAYER = (
    *(f"self_attn.{m}_proj.{p}" for m in "qkv" for p in ("weight", "bias")),
    *("self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    *("mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"),
)


@pytest.fixture
def adapter():
    return Qwen2StateDictAdapter(Qwen2Config(**SIZES))


@pytest.fixture
def tied():
    return Qwen2StateDictAdapter(Qwen2Config(**SIZES, tie_word_embeddings=True))


def meta_model(**changes):
    with torch.device("meta"):
        return Qwen2Model(Qwen2Config(**(SIZES | changes)))


@pytest.mark.parametrize(("ours", "theirs"), SIXTEEN.items())
@pytest.mark.parametrize("layer", [0, 11])
def test_lora_mapping_both_ways(adapter, ours, theirs, layer):
    tensor = torch.ones(2, 3)
    assert adapter.to_hf({ours.format(layer): tensor}) == {theirs.format(layer): tensor}
    assert adapter.from_hf({theirs.format(layer): tensor}) == {ours.format(layer): tensor}


def test_there_are_sixteen_lora_mappings(adapter):
    lora = {ours: hf for ours, hf in adapter.to_hf_map.items() if ".lora_" in ours}
    assert lora == SIXTEEN
    assert adapter.from_hf_map == {hf: ours for ours, hf in adapter.to_hf_map.items()}


def test_whole_model_with_adapters_both_ways(adapter):
    model = meta_model()
    apply_lora(
        model,
        LoRAConfig(target_modules=["q_proj", "down_proj", "lm_head"]),
        name_map=adapter.module_to_hf,
    )
    state = model.state_dict()
    hf = adapter.to_hf(state)
    base = {f"model.layers.{i}.{name}" for i in range(12) for name in HF_LAYER}
    base |= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name for name in hf if ".lora_" not in name} == base
    assert len(hf) == len(state) == len(base) + 2 * (2 * 12 + 1)
    back = adapter.from_hf(hf)
    assert back.keys() == state.keys()
    assert all(back[name] is state[name] for name in state)


def test_wrappers_do_not_reach_hf_names(adapter):
    name = "layers.0._checkpoint_wrapped_module._orig_mod.attention.wq.lora_a.weight"
    [(hf, _)] = adapter.convert_single_to_hf(name, torch.ones(1))
    assert hf == LAYER + ".0.self_attn.q_proj.lora_A.weight"
    assert adapter.module_to_hf("_orig_mod.output") == "lm_head"


def test_a_live_peft_models_names_are_read(adapter):
    live = {LAYER + ".3.self_attn.q_proj.lora_A.default.weight": torch.ones(1)}
    assert set(adapter.from_hf(live)) == {"layers.3.attention.wq.lora_a.weight"}
    both = live | {LAYER + ".3.self_attn.q_proj.lora_A.weight": torch.ones(1)}
    with pytest.raises(AdapterMismatch, match=r"another name also means 'layers.3.attention.wq"):
        adapter.from_hf(both)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attention.wq.lora_c.weight",
        "layers.0.attention.q_norm.weight",
        "layers.0.attention_norm.lora_a.weight",
        "tok_embeddings.lora_a.weight",
        "score.weight",
    ],
)
def test_unmapped_tensor_is_named_never_dropped(adapter, name):
    good = {"layers.0.attention.wq.weight": torch.ones(1)}
    with pytest.raises(UnmappedName, match=re.escape(repr(name))):
        adapter.to_hf(good | {name: torch.ones(1)})
    with pytest.raises(UnmappedName, match=r"shape \(1,\)"):
        adapter.convert_single_to_hf(name, torch.ones(1))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_norm.weight",
        "score.weight",
        "layers.0.self_attn.q_proj.weight",
        LAYER + ".0.mlp.gate.lora_A.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_unknown_hf_name_is_named_never_dropped(adapter, name):
    with pytest.raises(UnmappedName, match=re.escape(repr(name))):
        adapter.from_hf({"model.norm.weight": torch.ones(1), name: torch.ones(1)})


def test_only_rotary_frequencies_are_left_out(adapter):
    old = "model.layers.4.self_attn.rotary_emb.inv_freq"
    converted = adapter.from_hf({old: torch.ones(1), "model.norm.weight": torch.ones(1)})
    assert set(converted) == {"norm.weight"}
    assert adapter.from_hf_name(old) is None


def test_tied_model_has_no_head(tied):
    assert set(tied.to_hf_map) == set(Qwen2StateDictAdapter(Qwen2Config(**SIZES)).to_hf_map) - {
        "output.weight",
        "output.lora_a.weight",
        "output.lora_b.weight",
    }
    with pytest.raises(UnmappedName, match=r"output\.lora_a"):
        tied.to_hf({"output.lora_a.weight": torch.ones(1)})
    with pytest.raises(UnmappedName, match=r"lm_head\.lora_A"):
        tied.from_hf({"base_model.model.lm_head.lora_A.weight": torch.ones(1)})
    with pytest.raises(UnmappedName, match=r"'lm_head\.weight'"):
        tied.from_hf({"lm_head.weight": torch.ones(1)})
    assert tied.module_to_hf("output") is None


def test_tied_head_stored_twice(tied):
    table = torch.arange(6.0).view(3, 2)
    stored = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone()}
    assert set(tied.from_hf(stored)) == {"tok_embeddings.weight"}
    stored["lm_head.weight"][0, 0] = 9.0
    with pytest.raises(ModelLoadError, match=r"'lm_head.weight' differs from 'model.embed_tokens"):
        tied.from_hf(stored)


def test_module_names(adapter):
    expected = {
        "layers.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
        "layers.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
        "layers.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
        "layers.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
        "layers.{}.feed_forward.w1": "model.layers.{}.mlp.gate_proj",
        "layers.{}.feed_forward.w2": "model.layers.{}.mlp.down_proj",
        "layers.{}.feed_forward.w3": "model.layers.{}.mlp.up_proj",
        "output": "lm_head",
    }
    assert adapter.to_peft_module_map() == expected
    for ours, hf in expected.items():
        assert adapter.module_to_hf(ours.format(11)) == hf.format(11)
    assert adapter.module_to_hf("tok_embeddings") == "model.embed_tokens"
    assert adapter.module_to_hf("layers.0.ffn_norm") == "model.layers.0.post_attention_layernorm"
    assert adapter.module_to_hf("layers.0.attention") is None
    assert adapter.module_to_hf("") is None


def test_template_of():
    assert template_of("layers.3.moe.12") == ("layers.{}.moe.{}", ("3", "12"))
    assert template_of("w1.lora_a2.weight") == ("w1.lora_a2.weight", ())


SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.mark.parametrize(
    ("targets", "written"),
    [
        ("all-linear", SEVEN),
        (["v_proj", "q_proj"], ["q_proj", "v_proj"]),
        (["lm_head", "q_proj"], ["lm_head", "q_proj"]),
        (r".*\.(up|gate)_proj", ["gate_proj", "up_proj"]),
        (r"model\.layers\.7\.mlp\.up_proj", ["model.layers.7.mlp.up_proj"]),
    ],
)
def test_peft_config_names_what_is_adapted(adapter, targets, written):
    config = LoRAConfig(rank=8, alpha=24, target_modules=targets)
    made = adapter.create_peft_adapter_config(config, "org/base")
    assert made["target_modules"] == written
    assert made["base_model_name_or_path"] == "org/base"
    assert (made["r"], made["lora_alpha"], made["peft_type"]) == (8, 24, "LORA")
    assert LoRAConfig.from_peft(made).rank == 8


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["wq"], "'wq' is for no module"),
        (["q_proj", "norm"], r"model\.norm, which cannot take an adapter"),
        (["embed_tokens"], "which cannot take an adapter"),
    ],
)
def test_peft_config_refuses_wrong_targets(adapter, targets, message):
    with pytest.raises(TargetError, match=message):
        adapter.create_peft_adapter_config(LoRAConfig(target_modules=targets), "base")


def test_peft_config_refuses_the_head_of_a_tied_model(tied):
    assert tied.create_peft_adapter_config(LoRAConfig(), "base")["target_modules"] == SEVEN
    with pytest.raises(TargetError, match="'lm_head' is for no module"):
        tied.create_peft_adapter_config(LoRAConfig(target_modules=["lm_head"]), "base")
