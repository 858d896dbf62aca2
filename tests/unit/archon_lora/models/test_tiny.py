import json

import pytest
import torch
from support.model_dirs import read_weights
from tokenizers import Tokenizer

from archon_lora.errors import ModelLoadError
from archon_lora.models import load_pretrained
from archon_lora.models.tiny import DEFAULT_VOCAB, END, write_tiny_qwen2

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def test_same_arguments_same_bytes(tmp_path):
    first, again, other = (
        write_tiny_qwen2(tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert {path.name for path in first.iterdir()} == FILES
    for name in FILES:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_tokenizer_round_trip(tmp_path):
    write_tiny_qwen2(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(DEFAULT_VOCAB).ids == list(range(len(DEFAULT_VOCAB)))
    text = "3 + 4 =\n7 , 'it''s' \\ \"x\"  "
    ids = tokenizer.encode(text + END).ids
    assert ids[-1] == len(DEFAULT_VOCAB) == tokenizer.token_to_id(END)
    assert len(ids) == len(text) + 1
    assert tokenizer.decode(ids) == text


def test_config_states_the_shapes_written(tmp_path):
    write_tiny_qwen2(tmp_path, vocab="ab", hidden=24, layers=3, heads=6, kv_heads=3, tie=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["vocab_size"] == 3
    assert config["eos_token_id"] == config["pad_token_id"] == 2
    model, _ = load_pretrained(tmp_path)
    assert len(model.layers) == 3
    assert model(torch.tensor([[0, 1]])).shape == (1, 2, 3)


def test_weights_can_be_moved(tmp_path):
    """Matrices of the asked spread; norms near 1 and not 1."""
    write_tiny_qwen2(tmp_path, std=0.03, dtype=torch.bfloat16)
    weights = read_weights(tmp_path)
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert weights["lm_head.weight"].float().std().item() == pytest.approx(0.03, rel=0.1)
    norm = weights["model.layers.0.input_layernorm.weight"].float()
    assert norm.mean().item() == pytest.approx(1.0, abs=0.1)
    assert norm.std() > 0.01


@pytest.mark.parametrize("vocab", ["", "aa", "é", "\x7f"])
def test_wrong_vocabulary(tmp_path, vocab):
    with pytest.raises(ModelLoadError, match="distinct ASCII"):
        write_tiny_qwen2(tmp_path, vocab=vocab)


def test_wrong_shapes_write_nothing(tmp_path):
    with pytest.raises(ModelLoadError, match="num_key_value_heads 3 must divide"):
        write_tiny_qwen2(tmp_path / "x", kv_heads=3)
    assert not (tmp_path / "x").exists()
