"""Our Qwen2 against transformers' on the same files, with and without an adapter loaded by PEFT."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import PeftModel
from support.parity import (
    ALL,
    assert_close,
    assert_same_logits,
    load_theirs,
    random_peft_adapter,
)
from transformers import AutoTokenizer

from archon_lora import LoRAConfig, apply_lora, get_adapter_state_dict
from archon_lora.models import KVCache, base_fingerprint, load_pretrained
from archon_lora.models.qwen2 import Qwen2Config
from archon_lora.models.tiny import DEFAULT_VOCAB, END, write_tiny_qwen2

pytestmark = [
    pytest.mark.compat,
    # PEFT 0.21 asks for a property that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

VARIANTS = {
    "untied": {},
    "tied": {"tie": True},
    "one-kv-head": {"kv_heads": 1},
    "no-grouping": {"kv_heads": 4},
    "three-layers-wide-base": {"layers": 3, "hidden": 48, "rope_theta": 1e6},
}


@pytest.fixture(scope="module", params=VARIANTS, ids=list(VARIANTS))
def directory(request, tmp_path_factory):
    return write_tiny_qwen2(tmp_path_factory.mktemp("qwen2"), seed=3, **VARIANTS[request.param])


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, len(DEFAULT_VOCAB), (3, 19), generator=generator)


@pytest.fixture
def mask():
    """The first row is padded on the left, the second on the right, the third not at all."""
    mask = torch.ones(3, 19, dtype=torch.long)
    mask[0, :6] = 0
    mask[1, 11:] = 0
    return mask


def test_logits(directory, tokens, mask):
    ours, _ = load_pretrained(directory)
    assert_same_logits(ours, load_theirs(directory), tokens, mask)


def test_gradients(directory, tokens):
    ours, adapter = load_pretrained(directory)
    theirs = load_theirs(directory)
    torch.nn.functional.cross_entropy(ours(tokens).flatten(0, 1), tokens.flatten()).backward()
    logits = theirs(tokens).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    expected = dict(theirs.named_parameters())
    grads = adapter.to_hf({name: p.grad for name, p in ours.named_parameters()})
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert expected[name].grad.abs().max() > 0
        torch.testing.assert_close(grad, expected[name].grad, rtol=1e-4, atol=1e-6)


def test_state_dict_has_transformers_names_and_bytes(directory):
    ours, adapter = load_pretrained(directory)
    theirs = load_theirs(directory)
    converted = adapter.to_hf(ours.state_dict())
    named = dict(theirs.named_parameters())  # each tied parameter once, as in our model
    assert converted.keys() == named.keys()
    assert all(torch.equal(converted[name], named[name]) for name in named)


def test_config_resaved_by_transformers_is_read_alike(directory, tmp_path):
    theirs = load_theirs(directory)
    theirs.save_pretrained(tmp_path)
    assert Qwen2Config.from_hf(tmp_path) == Qwen2Config.from_hf(directory)
    resaved, _ = load_pretrained(tmp_path)
    first, _ = load_pretrained(directory)
    for mine, other in zip(first.parameters(), resaved.parameters(), strict=True):
        assert torch.equal(mine, other)
    # A second save by the same version does not change the identity.
    load_theirs(tmp_path).save_pretrained(tmp_path / "again")
    again = base_fingerprint(tmp_path / "again")["config_hash"]
    assert again == base_fingerprint(tmp_path)["config_hash"]


def test_logits_with_an_adapter_that_peft_loaded(directory, tokens, mask, tmp_path):
    random_peft_adapter(load_theirs(directory), targets=ALL, out=tmp_path)
    theirs = PeftModel.from_pretrained(load_theirs(directory), tmp_path).eval()

    ours, adapter = load_pretrained(directory)
    with torch.no_grad():
        base_logits = ours(tokens)
    apply_lora(ours, LoRAConfig(rank=4, alpha=12), name_map=adapter.module_to_hf)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    converted = adapter.from_hf(stored)
    assert converted.keys() == get_adapter_state_dict(ours).keys()
    outcome = ours.load_state_dict(converted, strict=False)
    assert not outcome.unexpected_keys

    with torch.no_grad():
        assert (ours(tokens) - base_logits).abs().max() > 0.01  # the adapter does something
    assert_same_logits(ours, theirs, tokens, mask)

    back = adapter.to_hf(get_adapter_state_dict(ours, full=True))
    assert back.keys() == stored.keys()
    assert all(torch.equal(back[name], stored[name]) for name in stored)


def test_adapter_on_the_output_head(tokens, mask, tmp_path):
    """All sixteen mappings at once, in a file that PEFT wrote."""
    directory = write_tiny_qwen2(tmp_path / "base", seed=4)
    theirs = random_peft_adapter(
        load_theirs(directory), targets=[*ALL, "lm_head"], out=tmp_path / "adapter"
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ours, adapter = load_pretrained(directory)
    apply_lora(
        ours,
        LoRAConfig(rank=4, alpha=12, target_modules=[*ALL, "lm_head"]),
        name_map=adapter.module_to_hf,
    )
    converted = adapter.from_hf(stored)
    assert converted.keys() == get_adapter_state_dict(ours).keys()
    ours.load_state_dict(converted, strict=False)
    assert_same_logits(ours, theirs, tokens, mask)


def test_peft_loads_what_the_adapter_config_describes(tokens, tmp_path):
    """Our config and our converted names make a directory that PEFT reads to the same logits."""
    directory = write_tiny_qwen2(tmp_path / "base", seed=6)
    ours, adapter = load_pretrained(directory)
    config = LoRAConfig(rank=3, alpha=9, target_modules=["q_proj", "down_proj", "gate_proj"])
    apply_lora(ours, config, name_map=adapter.module_to_hf)
    with torch.no_grad():
        for name, tensor in get_adapter_state_dict(ours).items():
            torch.manual_seed(len(name))
            tensor.copy_(0.2 * torch.randn(tensor.shape))

    out = tmp_path / "adapter"
    out.mkdir()
    state = adapter.to_hf(get_adapter_state_dict(ours, full=True))
    save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
    written = adapter.create_peft_adapter_config(config, str(directory))
    (out / "adapter_config.json").write_text(json.dumps(written))
    theirs = PeftModel.from_pretrained(load_theirs(directory), out).eval()
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits)


def test_tokenizer(directory):
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "12 + 7 =\n19, 'ok'"
    ids = tokenizer(text).input_ids
    assert ids == [DEFAULT_VOCAB.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.eos_token_id == len(DEFAULT_VOCAB)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert len(tokenizer) == len(DEFAULT_VOCAB) + 1


def test_greedy_generation_agrees(directory, tokens):
    theirs = load_theirs(directory)
    ours, _ = load_pretrained(directory)
    prompt = tokens[:1, :5]
    expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=-1)
    cache = KVCache(16)
    sequence, new = prompt, prompt
    with torch.no_grad():
        for _ in range(8):
            new = ours(new, cache=cache)[:, -1:].argmax(-1)
            sequence = torch.cat((sequence, new), dim=1)
    assert torch.equal(sequence, expected)
