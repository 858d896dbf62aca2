import pytest

from archon_lora.errors import ModelLoadError
from archon_lora.models.qwen2 import Qwen2Config

BASE = {
    "model_type": "qwen2",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_both_spellings_of_the_rotary_base():
    assert Qwen2Config.from_hf(BASE).rope_theta == 10000.0
    assert Qwen2Config.from_hf(BASE | {"rope_theta": 1e6, "rope_scaling": None}).rope_theta == 1e6
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    assert Qwen2Config.from_hf(BASE | new).rope_theta == 5e5
    with pytest.raises(ModelLoadError, match=r"rope_theta is 10.0, but rope_parameters"):
        Qwen2Config.from_hf(BASE | new | {"rope_theta": 10.0})


def test_kv_heads_default_to_query_heads():
    raw = {key: value for key, value in BASE.items() if key != "num_key_value_heads"}
    assert Qwen2Config.from_hf(raw).num_key_value_heads == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'qwen2'"),
        ({"hidden_size": None, "vocab_size": None}, "lacks vocab_size, hidden_size"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"head_dim": 32}, "head_dim=32"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "rope_scaling with .* 'dynamic'",
        ),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, r"\['factor'\]"),
        ({"rope_parameters": [1]}, "must be an object or null"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 must divide"),
        ({"hidden_size": 66}, "hidden_size 66 must divide into 4 heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer >= 1, got 0"),
        ({"vocab_size": "7"}, "vocab_size must be an integer >= 1, got '7'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps must be a number > 0"),
        ({"rope_theta": "big"}, "rope_theta must be a number > 0, got 'big'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change, message):
    with pytest.raises(ModelLoadError, match=message):
        Qwen2Config.from_hf(BASE | change)


def test_directory_without_config(tmp_path):
    with pytest.raises(ModelLoadError, match=r"cannot read .*config.json: No such file"):
        Qwen2Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="is not JSON"):
        Qwen2Config.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="must hold a JSON object, got list"):
        Qwen2Config.from_hf(tmp_path)
