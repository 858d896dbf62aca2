"""Variants of LoRA against PEFT's on the same numbers: embeddings, heads, named adapters, both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ckpt
from archon_lora import (
    AdapterMismatch,
    LoRAConfig,
    TargetError,
    adapter_mode,
    add_adapter,
    apply_lora,
    get_adapter_params,
    get_adapter_state_dict,
    iter_merged_weights,
    load_adapter_tensors,
    peft_export,
)
from ckpt import CheckpointManager, TrainState
from ckpt.peft import read_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.compat,
    # PEFT 0.21 reads an attribute that transformers 5.24 has renamed.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

TOKENS = torch.tensor([[1, 5, 9, 30, 5], [0, 2, 2, 7, 1]])

OPTIONS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "both": {
        "target_modules": ["embed_tokens", "lm_head"],
        "rank_pattern": {"embed_tokens": 2},
        "alpha_pattern": {"lm_head": 3},
        "use_rslora": True,
    },
}


def tiny(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def logits(model: Any) -> Tensor:
    return model(TOKENS).logits


def fill(parameters: dict[str, nn.Parameter], *, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            parameters[name].normal_(std=0.3)


def factors(peft_model: Any, adapter: str = "default") -> dict[str, nn.Parameter]:
    """PEFT's parameters of one adapter under our names for a default one."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            short = name.removeprefix("base_model.model.").replace(f".{adapter}", "")
            for factor in "AB":
                short = short.replace(f"lora_{factor}", f"lora_{factor.lower()}")
                short = short.replace(
                    f"lora_embedding_{factor}", f"lora_embedding_{factor.lower()}"
                )
            found[short] = parameter
    return found


def ours(key: str, adapter: str) -> str:
    """The name of a default adapter's parameter as that of another one's."""
    return key if adapter == "default" else key.replace(".lora_", f".adapters.{adapter}.lora_")


def twins(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The two implementations with the same numbers."""
    mine, base = tiny(dtype), tiny(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    apply_lora(mine, LoRAConfig(rank=4, alpha=8, adapter_dtype=wide, **OPTIONS[name]))
    fill(get_adapter_params(mine))
    other = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **OPTIONS[name]))
    values = get_adapter_state_dict(mine)
    assert factors(other).keys() == values.keys()
    with torch.no_grad():
        for key, parameter in factors(other).items():
            assert parameter.shape == values[key].shape, key
            assert parameter.dtype == values[key].dtype, key
            parameter.copy_(values[key])
    return mine, other


@pytest.mark.parametrize(
    ("name", "dtype", "close"),
    [
        ("embedding", torch.float32, {"rtol": 1e-5, "atol": 1e-6}),
        ("head", torch.float32, {"rtol": 1e-5, "atol": 1e-6}),
        # Where rounding hides nothing.
        ("both", torch.float64, {"rtol": 1e-12, "atol": 1e-13}),
        ("both", torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2}),
    ],
    ids=["embedding", "head", "both, fp64", "both, bf16 base"],
)
def test_forward_gradients_and_five_steps_are_equal(
    name: str, dtype: torch.dtype, close: dict[str, float]
) -> None:
    mine, other = twins(name, dtype)
    assert not torch.allclose(logits(mine), logits(tiny(dtype)), atol=1e-2), "no effect"
    torch.testing.assert_close(logits(mine), logits(other), **close)
    pairs = [(mine, get_adapter_params(mine)), (other, factors(other))]
    optimizers = []
    for model, parameters in pairs:
        logits(model).float().square().mean().backward()
        optimizers.append(torch.optim.AdamW(parameters.values(), lr=1e-2))
    for key, parameter in get_adapter_params(mine).items():
        assert torch.count_nonzero(parameter.grad)
        torch.testing.assert_close(parameter.grad, factors(other)[key].grad, **close)
    for (model, _), optimizer in zip(pairs, optimizers, strict=True):
        for _ in range(5):
            optimizer.step()
            optimizer.zero_grad()
            logits(model).float().square().mean().backward()
    if dtype != torch.bfloat16:  # Adam's first steps turn on the sign of rounding noise there
        for key, parameter in get_adapter_params(mine).items():
            loose = {k: v * 100 for k, v in close.items()}
            torch.testing.assert_close(parameter, factors(other)[key], **loose)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("normalise", [True, False])
def test_peft_loads_what_is_exported_and_ours_loads_what_peft_saved(
    tmp_path: Path, name: str, normalise: bool
) -> None:
    mine, other = twins(name)
    with torch.no_grad():
        wanted = logits(mine)
    export = peft_export(mine, normalise=normalise)
    with CheckpointManager(str(tmp_path / "run"), publish_dtype="float32") as manager:
        manager.save(0, TrainState(mine, export=export), publish=True).wait()
    (config,) = (tmp_path / "run" / "adapters").rglob("adapter_config.json")
    loaded = peft.PeftModel.from_pretrained(tiny(), config.parent)
    with torch.no_grad():
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-5, atol=1e-5)
    saved = tmp_path / "theirs"
    other.save_pretrained(saved, save_embedding_layers=False)
    fresh = tiny()
    apply_lora(fresh, LoRAConfig(rank=4, alpha=8, **OPTIONS[name]))
    read, tensors = read_adapter(str(saved))
    load_adapter_tensors(fresh, tensors, read)
    with torch.no_grad():
        torch.testing.assert_close(logits(fresh), wanted, rtol=1e-5, atol=1e-5)
    # The same file through the checkpoint service, a part at a time.
    started = tiny()
    apply_lora(started, LoRAConfig(rank=4, alpha=8, **OPTIONS[name]))
    ckpt.warm_start(TrainState(started), str(saved))
    with torch.no_grad():
        torch.testing.assert_close(logits(started), wanted, rtol=1e-5, atol=1e-5)


def test_a_resume_of_an_embedding_is_exact_and_a_merge_computes_the_same(tmp_path: Path) -> None:
    mine, _ = twins("both")
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save(0, TrainState(mine)).wait()
        fresh = tiny()
        apply_lora(fresh, LoRAConfig(rank=4, alpha=8, **OPTIONS["both"]))
    with CheckpointManager(str(tmp_path)) as manager:
        manager.restore(TrainState(fresh))
    assert torch.equal(logits(fresh), logits(mine))
    merged = tiny()
    with torch.no_grad():
        for name, weight in iter_merged_weights(mine):
            merged.get_parameter(name).copy_(weight)
    torch.testing.assert_close(logits(merged), logits(mine), rtol=1e-5, atol=1e-5)
    with adapter_mode(mine, "base"):
        assert torch.equal(logits(mine), logits(tiny()))


def test_an_embedding_starts_at_the_base_with_pefts_values() -> None:
    mine = tiny()
    apply_lora(mine, LoRAConfig(rank=8, alpha=8, target_modules=["embed_tokens"]))
    assert torch.equal(logits(mine), logits(tiny()))
    a, b = get_adapter_params(mine).values()
    assert not torch.count_nonzero(a)
    assert float(b.detach().std()) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("kind", ["embed_tokens", "lm_head"])
def test_tied_embeddings_are_refused_with_the_reason(kind: str) -> None:
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(TargetError, match="is tied to another parameter"):
        apply_lora(model, LoRAConfig(target_modules=["q_proj", kind]))


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (Scaled(32, 16), "with a forward of its own"),
        (nn.Embedding(32, 16, max_norm=1.0), "max_norm=1, which changes its rows"),
    ],
)
def test_embeddings_that_cannot_be_right_are_refused(table: nn.Embedding, reason: str) -> None:
    model = tiny()
    model.model.embed_tokens = table
    with pytest.raises(TargetError, match=reason):
        apply_lora(model, LoRAConfig(target_modules=["embed_tokens"]))


def test_keys_of_an_embedding_and_of_a_linear_layer_are_not_mixed_up() -> None:
    mine, _ = twins("embedding")
    export = peft_export(mine, normalise=False)
    values = get_adapter_state_dict(mine)
    tensors = {rule["key"]: values[rule["source"]] for rule in export["rules"]}
    key = next(key for key in tensors if "lora_embedding_A" in key)
    tensors[key.replace("lora_embedding_A", "lora_A.weight")] = tensors.pop(key)
    with pytest.raises(AdapterMismatch, match=r"1 missing: .*lora_embedding_A; 1 unexpected"):
        load_adapter_tensors(mine, tensors, export["peft_config"])


def test_several_adapters_are_those_of_peft(tmp_path: Path) -> None:
    """Two adapters of other ranks and targets: each computes, learns and is saved as PEFT's."""
    settings = {
        "default": {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        "second": {"rank": 2, "alpha": 6, "target_modules": ["v_proj", "lm_head", "embed_tokens"]},
    }
    mine = tiny()
    apply_lora(mine, LoRAConfig(**settings["default"]))
    add_adapter(mine, "second", LoRAConfig(**settings["second"]))
    for seed, name in enumerate(settings):
        fill(get_adapter_params(mine, adapter=name), seed=seed)
    theirs = [
        peft.LoraConfig(r=s["rank"], lora_alpha=s["alpha"], target_modules=s["target_modules"])
        for s in settings.values()
    ]
    other = peft.get_peft_model(tiny(), theirs[0])
    other.add_adapter("second", theirs[1])
    for name in settings:
        values = get_adapter_state_dict(mine, adapter=name)
        with torch.no_grad():
            for key, parameter in factors(other, name).items():
                parameter.copy_(values[ours(key, name)])
    for name in settings:
        other.set_adapter(name)
        mine.zero_grad(set_to_none=True)
        with adapter_mode(mine, name):
            torch.testing.assert_close(logits(mine), logits(other), rtol=1e-5, atol=1e-6)
            logits(mine).square().mean().backward()
        logits(other).square().mean().backward()
        for key, parameter in factors(other, name).items():
            grad = get_adapter_params(mine, adapter=name)[ours(key, name)].grad
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-5, atol=1e-6)
    other.save_pretrained(tmp_path, save_embedding_layers=False)
    for name in settings:
        folder = tmp_path if name == "default" else tmp_path / name
        config, tensors = read_adapter(str(folder))
        export = peft_export(mine, adapter=name, normalise=False)
        assert {rule["key"] for rule in export["rules"]} == tensors.keys()
        values = get_adapter_state_dict(mine, adapter=name)
        for rule in export["rules"]:
            assert torch.equal(values[rule["source"]], tensors[rule["key"]])
        fill(get_adapter_params(mine, adapter=name), seed=9)
        load_adapter_tensors(mine, tensors, config, adapter=name)
        for key, value in get_adapter_state_dict(mine, adapter=name).items():
            assert torch.equal(value, values[key]), key
    assert json.loads((tmp_path / "second" / "adapter_config.json").read_text())["r"] == 2
