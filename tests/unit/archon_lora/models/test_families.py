"""What the families' configurations refuse, and what the registry finds."""

import pytest
import torch

from archon_lora.errors import ModelLoadError, UnmappedName
from archon_lora.models import get_model_spec, model_specs
from archon_lora.models.masks import visibility
from archon_lora.models.rope import RotaryEmbedding
from archon_lora.models.rope_config import RopeScaling

BASE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def read(family, **changes):
    own = MOE if family == "qwen3_moe" else {}
    raw = {"model_type": family, **BASE, **own, **changes}
    return get_model_spec(family).config_cls.from_hf(raw)


def test_registry_finds_the_folders():
    assert set(model_specs()) == {
        *("gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"),
    }
    for name, spec in model_specs().items():
        assert spec.model_type == spec.config_cls.model_type == name


COMMON = [
    ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported"),
    ({"hidden_act": "relu", "hidden_activation": "relu"}, "hidden_act.*='relu' is not supported"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling with .* 'dynamic'"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0}}, r"'yarn' and \['mscale'\]"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks high_freq_factor, low_freq"),
    ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "factor must be a number > 0, got -1.0"),
    ({"rope_scaling": {"type": "linear", "factor": float("inf")}}, "factor must be a number > 0"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor 1.0 must be above"),
    ({"rope_theta": True}, "rope_theta must be a number > 0, got True"),
    ({"head_dim": 7}, "head_dim"),
]
OWN = [
    ("llama", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ("llama", {"mlp_bias": "no"}, "mlp_bias must be true or false, got 'no'"),
    ("mistral", {"sliding_window": 0}, "sliding_window must be an integer >= 1, got 0"),
    ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types=.* is not supported"),
    ("mistral", {"num_key_value_heads": None}, "lacks num_key_value_heads"),
    ("qwen3", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 2}, "layer_types=.* is not supported"),
    ("gemma", {"attention_bias": 1}, "attention_bias must be true or false, got 1"),
    ("gemma", {"use_bidirectional_attention": True}, "attention here is causal"),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ("gemma2", {"use_bidirectional_attention": True}, "attention here is causal"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must name .* each of 2 layers"),
    ("gemma2", {"layer_types": ["full_attention", "linear"]}, "layer_types must name"),
    ("gemma2", {"sliding_window": None}, "sliding_window must be an integer >= 1, got None"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping must be a number > 0"),
    ("gemma2", {"final_logit_softcapping": "no"}, "final_logit_softcapping must be a number > 0"),
    ("gemma2", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar must be a number > 0"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "Gemma 3 has no soft caps"),
    ("gemma3_text", {"final_logit_softcapping": 30.0}, "Gemma 3 has no soft caps"),
    ("gemma3_text", {"rope_local_base_freq": 0}, "rope_local_base_freq must be a number > 0"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be an integer"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention layers have unscaled RoPE here",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"full_attention": None, "factor": 2.0}},
        r"rope_parameters has \['factor'\] beside",
    ),
]


@pytest.mark.parametrize("family", sorted(model_specs()))
@pytest.mark.parametrize(("change", "message"), COMMON)
def test_what_no_family_computes_is_refused_by_name(family, change, message):
    read(family)
    with pytest.raises(ModelLoadError, match=message):
        read(family, **change)


@pytest.mark.parametrize(("family", "change", "message"), OWN)
def test_what_a_family_does_not_compute_is_refused_by_name(family, change, message):
    with pytest.raises(ModelLoadError, match=message):
        read(family, **change)


def test_scaling_from_both_spellings():
    old = read("llama", rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=8192)
    new = read("llama", rope_parameters=LLAMA3 | {"rope_theta": 5e5}, max_position_embeddings=8192)
    assert old == new
    assert old.rope_scaling == RopeScaling(
        kind="llama3", factor=8.0, original_max_position_embeddings=8192
    )
    both = {"rope_parameters": {"type": "linear", "factor": 2.0}}
    with pytest.raises(ModelLoadError, match="ask for different scalings"):
        read("llama", rope_scaling=LLAMA3, **both)


def test_defaults_are_those_of_transformers():
    """A key that is left out and one that is null are two things where null is a value."""
    assert read("mistral").sliding_window == 4096
    assert read("mistral", sliding_window=None).traits().windows == (None, None)
    assert read("qwen3").head_dim == 128
    assert read("gemma", hidden_act="gelu").tie_word_embeddings
    gemma2 = read("gemma2")
    assert gemma2.traits().windows == (4096, None)
    assert (gemma2.traits().attention_softcap, gemma2.traits().logit_softcap) == (50.0, 30.0)
    assert read("gemma2", attn_logit_softcapping=None).traits().attention_softcap is None
    gemma3 = read("gemma3_text", num_hidden_layers=12, sliding_window=512)
    assert [i for i, window in enumerate(gemma3.traits().windows) if window is None] == [5, 11]


def test_gemma3_reads_both_spellings_of_its_two_bases():
    old = read(
        "gemma3_text",
        rope_theta=2e6,
        rope_local_base_freq=1e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    new = read(
        "gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    )
    assert old == new
    assert (new.rope_theta, new.traits().local_rope_theta) == (2e6, 1e3)
    assert new.rope_scaling == RopeScaling(kind="linear", factor=8.0)
    bare = read("gemma3_text")
    assert (bare.rope_theta, bare.rope_local_base_freq) == (1e6, 1e4)


def test_stretched_frequencies_survive_to_empty():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=64)
    with torch.device("meta"):
        rope = RotaryEmbedding(16, 1e4, scaling)
    rope.to(torch.bfloat16).to_empty(device="cpu")
    plain = RotaryEmbedding(16, 1e4).inv_freq
    ratio = plain / rope.inv_freq
    # Fast pairs stay, slow ones are stretched whole, one lies between.
    assert ratio[0] == 1
    torch.testing.assert_close(ratio[-1], torch.tensor(8.0))
    assert ((ratio > 1.001) & (ratio < 7.999)).any()


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("window", [1, 2, 5, 100])
def test_a_window_hides_what_lies_further_back(past, window):
    tokens = torch.zeros(1, 6, dtype=torch.long)
    mask = visibility(tokens, None, past, window)
    if mask is None:
        assert (past, window) == (0, 100)
        return
    for query in range(6):
        seen = mask[0, 0, query].nonzero().flatten().tolist()
        assert seen == list(range(max(0, query + past - window + 1), query + past + 1))


def test_composite_names():
    spec = get_model_spec("llama")
    config = read("llama", tie_word_embeddings=True)
    text = spec.state_dict_adapter_cls(config)
    inner = spec.state_dict_adapter_cls(config, composite=True)
    prefix = "model.language_model."
    assert {hf: ours for hf, ours in inner.from_hf_map.items() if prefix not in hf} == {}
    renamed = {hf.replace(prefix, "model.", 1): ours for hf, ours in inner.from_hf_map.items()}
    assert renamed == text.from_hf_map
    assert inner.module_to_hf("layers.1.attention.wq") == f"{prefix}layers.1.self_attn.q_proj"
    assert inner.from_hf_name(f"{prefix}layers.0.self_attn.rotary_emb.inv_freq") is None
    table = torch.ones(2, 2)
    stored = {f"{prefix}embed_tokens.weight": table, "lm_head.weight": table.clone()}
    assert set(inner.from_hf(stored)) == {"tok_embeddings.weight"}
    with pytest.raises(UnmappedName, match=r"'model.norm.weight'"):
        inner.from_hf({"model.norm.weight": table})
