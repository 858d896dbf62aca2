"""Own adapters on plain transformers models: parity with PEFT, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archon_lora import LoRAConfig, TargetError, apply_lora
from archon_lora.peft import load_adapter_tensors, peft_key

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
KINDS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "gptneox": ("GPTNeoXConfig", "GPTNeoXForCausalLM"),
    "opt": ("OPTConfig", "OPTForCausalLM"),
    "bert": ("BertConfig", "BertForMaskedLM"),
}


def build(kind: str) -> Any:
    """A small random model, the same each time, in evaluation mode."""
    config, model = (getattr(transformers, name) for name in KINDS[kind])
    sizes = dict(SIZES)
    if kind == "opt":
        sizes |= {"ffn_dim": sizes.pop("intermediate_size"), "word_embed_proj_dim": 16}
    torch.manual_seed(0)
    return model(config(**sizes)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_of_linear_layers_computes_what_peft_computes(kind: str) -> None:
    theirs = peft.get_peft_model(
        build(kind), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    ).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    ours = build(kind)
    record = apply_lora(ours, LoRAConfig(rank=4, alpha=8, target_modules="all-linear"))
    adapter = peft.get_peft_model_state_dict(theirs)
    expected = {peft_key(hf, side) for hf in record.matched.values() for side in ("A", "B")}
    assert adapter.keys() == expected, "the same modules, found by the same rules"
    load_adapter_tensors(ours, adapter, theirs.peft_config["default"].to_dict())
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"]])
def test_conv1d_is_refused_by_name(targets: Any) -> None:
    with pytest.raises(TargetError, match=r"Conv1D.*only nn\.Linear"):
        apply_lora(gpt2(), LoRAConfig(target_modules=targets))
