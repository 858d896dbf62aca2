import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from archon_lora import LoRAConfig, TargetError, apply_lora
from archon_lora.models import KVCache
from archon_lora.models.masks import visibility
from archon_lora.models.qwen2 import Qwen2Config, Qwen2Model, parallelize

CONFIG = Qwen2Config(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Qwen2Model(CONFIG).eval()


@pytest.fixture
def tokens():
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))


def test_fqns(model):
    block = {
        *(f"attention.{m}.{p}" for m in ("wq", "wk", "wv") for p in ("weight", "bias")),
        "attention.wo.weight",
        *(f"feed_forward.{m}.weight" for m in ("w1", "w2", "w3")),
        "attention_norm.weight",
        "ffn_norm.weight",
    }
    expected = {f"layers.{i}.{name}" for i in (0, 1) for name in block}
    expected |= {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert set(model.state_dict()) == expected
    assert {name for name, _ in model.named_parameters()} == expected


def test_tied_model_has_one_parameter_under_one_name():
    config = Qwen2Config.from_hf(
        {"model_type": "qwen2", "tie_word_embeddings": True}
        | {
            key: getattr(CONFIG, key)
            for key in CONFIG.__dataclass_fields__
            if key != "tie_word_embeddings"
        }
    )
    tied = Qwen2Model(config)
    assert "output.weight" not in tied.state_dict()
    logits = tied(torch.zeros(1, 2, dtype=torch.long))
    assert logits.shape == (1, 2, 40)
    logits.sum().backward()
    assert tied.tok_embeddings.weight.grad[39].abs().sum() > 0  # reached through the head alone
    wanted = r"selects tok_embeddings, but .*\(tie_word_embeddings\)"
    with pytest.raises(TargetError, match=wanted):
        apply_lora(tied, LoRAConfig(target_modules=["wq", "tok_embeddings"]))
    apply_lora(Qwen2Model(CONFIG), LoRAConfig(target_modules=["wq", "tok_embeddings"]))


def test_rotary_frequencies_survive_meta_to_empty_and_casts(model):
    with torch.device("meta"):
        meta = Qwen2Model(CONFIG)
    assert all(p.is_meta for p in meta.parameters())
    meta.to(torch.bfloat16).to_empty(device="cpu")
    assert meta.rope.inv_freq.dtype == torch.float32
    assert torch.equal(meta.rope.inv_freq, model.rope.inv_freq)
    meta.rope.inv_freq.fill_(7.0)
    meta.init_buffers()
    assert torch.equal(meta.rope.inv_freq, model.rope.inv_freq)
    meta.load_state_dict(model.state_dict())
    assert meta(torch.zeros(1, 2, dtype=torch.long)).dtype == torch.bfloat16


def test_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 40
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(model, tokens, side):
    """A row padded on either side gives the logits and gradients of the bare row."""
    bare = model(tokens[:1, :6])
    padding = torch.full((1, 3), 3)
    real = torch.ones(1, 6, dtype=torch.long)
    order = (padding, tokens[:1, :6]) if side == "left" else (tokens[:1, :6], padding)
    mask_order = (real * 0)[:, :3], real
    mask = torch.cat(mask_order if side == "left" else mask_order[::-1], dim=1)
    padded = model(torch.cat(order, dim=1), attention_mask=mask)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[mask.bool()][None], bare, rtol=0, atol=1e-5)

    bare.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    padded[mask.bool()].square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_every_query_has_a_key(tokens):
    """Also a padded one: attention kernels differ in what a row without keys gives."""
    mask = torch.ones(3, 13, dtype=torch.long)
    mask[0, :6] = 0  # padding that reaches from the cached tokens into the new ones
    mask[1, 9:] = 0
    visible = visibility(tokens, mask, 4)
    assert visible.shape == (3, 1, 9, 13)
    assert visible.any(-1).all()
    # Real queries see the real keys up to themselves and nothing else.
    for row, query in ((0, 3), (1, 2), (2, 8)):
        expected = [bool(mask[row, key]) and key <= query + 4 for key in range(13)]
        assert visible[row, 0, query].tolist() == expected


def test_cache_step_by_step_equals_one_pass(model, tokens):
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, :3] = False
    whole = model(tokens, attention_mask=mask)
    cache = KVCache(9)
    with torch.no_grad():
        parts = [model(tokens[:, :4], attention_mask=mask[:, :4], cache=cache)]
        parts.append(model(tokens[:, 4:6], attention_mask=mask[:, :6], cache=cache))
        for i in range(6, 9):
            step = tokens[:, i : i + 1]
            parts.append(model(step, attention_mask=mask[:, : i + 1], cache=cache))
    assert cache.length == 9
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], rtol=0, atol=1e-5)


def test_cache_without_mask(model, tokens):
    cache = KVCache(12)
    with torch.no_grad():
        parts = [model(tokens[:, :5], cache=cache), model(tokens[:, 5:], cache=cache)]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=0, atol=1e-5)


def test_given_positions_are_used(model, tokens):
    shifted = torch.arange(9)[None] * 2
    assert not torch.allclose(model(tokens, positions=shifted), model(tokens))
    same = model(tokens, positions=torch.arange(9)[None])
    assert torch.equal(same, model(tokens))


def test_misuse_is_refused(model, tokens):
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(tokens, cache=KVCache(20))
    with pytest.raises(ValueError, match=r"attention_mask must be .* \(3, 9\), got \(3, 4\)"):
        model(tokens, attention_mask=torch.ones(3, 4))
    with pytest.raises(ValueError, match="capacity must be >= 1"):
        KVCache(0)
    with torch.no_grad():
        with pytest.raises(ValueError, match="holds 8 tokens per row, 9 are needed"):
            model(tokens, cache=KVCache(8))
        cache = KVCache(20)
        model(tokens, cache=cache)
        with pytest.raises(ValueError, match="started with batch 3, got 2"):
            model(tokens[:2], cache=cache)


def test_recomputation_gives_the_same_gradients(model, tokens):
    other = copy.deepcopy(model)
    calls = []
    for block in other.layers.values():
        block.recompute = True
        block.ffn_norm.register_forward_hook(lambda *_: calls.append(1))
    model(tokens).square().mean().backward()
    other(tokens).square().mean().backward()
    assert len(calls) == 4  # two blocks, forward and again in backward
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)


def test_parallelize_refuses_blocks_that_are_wrapped(model):
    model.layers["1"] = checkpoint_wrapper(model.layers["1"])
    with pytest.raises(ValueError, match=r"layers\.1 is a CheckpointWrapper, expected Trans"):
        parallelize(model, None)
