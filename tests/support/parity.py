"""Our models beside transformers', and adapters that PEFT wrote."""

from __future__ import annotations

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from archon_lora.models import KVCache

TOLERANCE = 1e-5

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_theirs(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def assert_same_logits(ours, theirs, tokens, mask):
    """A plain batch, a padded batch, and a padded batch generated token by token."""
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits)

        whole = ours(tokens, attention_mask=mask)
        real = mask.bool()
        # transformers counts positions from the row's start; RoPE is relative, logits the same.
        assert_close(whole[real], theirs(tokens, attention_mask=mask).logits[real])

        cache = KVCache(tokens.shape[1])
        parts = [ours(tokens[:, :8], attention_mask=mask[:, :8], cache=cache)]
        parts += [
            ours(tokens[:, i : i + 1], attention_mask=mask[:, : i + 1], cache=cache)
            for i in range(8, tokens.shape[1])
        ]
        stepwise = torch.cat(parts, dim=1)[real]
        assert_close(stepwise, whole[real])
        assert_close(stepwise, theirs(tokens, attention_mask=mask).logits[real])


def assert_close(ours, theirs):
    assert theirs.std() > 0.1  # logits that differ by token, so that the tolerance means something
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


def random_peft_adapter(base, *, targets, out):
    """An adapter saved by PEFT whose A and B are both random; the wrapped model is returned."""
    config = PeftLoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    # PEFT would write the whole head beside an adapter on it.
    model.save_pretrained(out, save_embedding_layers=False)
    return model
