"""An exported directory in PEFT and transformers: logits of the base with the adapter merged in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.steps import write_step

from ckpt.consolidate import consolidate
from ckpt.layout import new_attempt
from ckpt.publish import publish_version
from ckpt.source import StepSource
from ckpt.storage import open_storage
from ckpt.types import AdapterExport, TensorRule

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.compat,
    pytest.mark.slow,
    # PEFT reads a property that transformers is about to rename.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

RANKS = {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 8, "gate_proj": 2, "up_proj": 2}
ALPHA = 6.0
WIDEST = max(RANKS.values())
TOKENS = torch.arange(1, 25).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny random Qwen2 directory, fp32."""
    directory = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    transformers.Qwen2ForCausalLM(config).save_pretrained(directory)
    return directory


def model(base: Path) -> torch.nn.Module:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return loaded.eval()


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(TOKENS).logits


def trained(base: Path) -> tuple[dict[str, torch.Tensor], AdapterExport, dict[str, torch.Tensor]]:
    """Checkpoint tensors of mixed ranks, their normalised export, and the deltas made by hand."""
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    deltas: dict[str, torch.Tensor] = {}
    rules: list[TensorRule] = []
    for name, module in model(base).named_modules():
        rank = RANKS.get(name.rpartition(".")[2])
        if rank is None or not isinstance(module, torch.nn.Linear):
            continue
        fqn = name.removeprefix("model.")
        scaling = ALPHA / rank
        a = torch.randn(rank, module.in_features, generator=generator) * 0.3
        b = torch.randn(module.out_features, rank, generator=generator) * 0.3
        deltas[name] = scaling * (b @ a)
        for side, tensor, scale, pad_dim in (("a", a, 1.0, 0), ("b", b, scaling, 1)):
            source = f"{fqn}.lora_{side}.weight"
            tensors[f"model.{source}"] = tensor
            key = f"base_model.model.{name}.lora_{side.upper()}.weight"
            padded = rank < WIDEST
            rules.append(
                TensorRule(
                    source,
                    key,
                    scale,
                    pad_dim if padded else None,
                    WIDEST if padded else None,
                )
            )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": WIDEST,
        "lora_alpha": WIDEST,
        "target_modules": sorted(RANKS),
        "bias": "none",
        "init_lora_weights": True,
    }
    return tensors, AdapterExport(config, tuple(rules)), deltas


def merged(base: Path, deltas: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the base with every delta added to its weight in fp32."""
    whole = model(base)
    with torch.no_grad():
        for name, delta in deltas.items():
            whole.get_submodule(name).weight += delta
    return logits(whole)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_exported_directory(base: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    tensors, export, deltas = trained(base)
    write_step(open_storage(tmp_path / "root"), 1, tensors, world=3, dim=1, export=export)
    consolidate(tmp_path / "root", 1, tmp_path / "out", dtype=dtype)
    loaded = peft.PeftModel.from_pretrained(model(base), tmp_path / "out")
    wanted = merged(base, deltas)
    plain = logits(model(base))
    assert (wanted - plain).abs().max() > 10 * tolerance  # the adapter changes something
    torch.testing.assert_close(logits(loaded), wanted, rtol=0, atol=tolerance)


def test_published_version(base: Path, tmp_path: Path) -> None:
    tensors, export, deltas = trained(base)
    storage = open_storage(tmp_path)
    manifest = write_step(storage, 1, tensors, world=2, export=export)
    version = publish_version(
        storage,
        run="run7",
        export=export,
        source=StepSource(storage, "steps/step-00000001.w0001", manifest),
        dtype="float32",
        step=1,
        policy_version=1,
        epoch=1,
        attempt=new_attempt(),
        base=None,
    )
    directory = tmp_path / "adapters" / version.name
    loaded = peft.PeftModel.from_pretrained(model(base), directory)
    torch.testing.assert_close(logits(loaded), merged(base, deltas), rtol=0, atol=1e-5)
    assert peft.PeftConfig.from_pretrained(directory).r == WIDEST
