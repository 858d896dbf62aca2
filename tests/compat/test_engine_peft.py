"""What the engine saves is read by PEFT and transformers, and the other way round."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.engines import batch_of, make_engine, tiny_model, train

os.environ["HF_HUB_OFFLINE"] = "1"

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from archon_lora.config import LoRAConfig
from archon_lora.engine import ArchonEngine, SaveLoadMeta, load_lora_adapter, save_lora_adapter

pytestmark = [
    pytest.mark.compat,
    # PEFT 0.21 asks for a property that transformers 5 renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

TOLERANCE = 1e-5
CASES = {
    "all-linear": LoRAConfig(rank=4, alpha=8.0),
    "rslora": LoRAConfig(rank=3, alpha=5.0, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    "patterns": LoRAConfig(
        rank=4, alpha=8.0, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3.0}
    ),
    "head": LoRAConfig(rank=2, target_modules=["lm_head", "v_proj"]),
}


@pytest.fixture
def engine_of(tmp_path: Path) -> Iterator[Callable[..., ArchonEngine]]:
    made: list[ArchonEngine] = []
    path = tiny_model(tmp_path / "model")

    def make(**options: object) -> ArchonEngine:
        made.append(make_engine(path, **options))
        return made[-1]

    yield make
    for engine in reversed(made):
        engine.close()


def _theirs(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch_of()["input_ids"]).logits


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_a_saved_adapter(engine_of, tmp_path: Path, case: str) -> None:
    engine = engine_of(lora=CASES[case])
    train(engine, 3)
    save_lora_adapter(engine, tmp_path / "adapter")
    base = _logits(_theirs(engine.config.path))
    loaded = PeftModel.from_pretrained(_theirs(engine.config.path), tmp_path / "adapter")
    ours = engine.forward(batch_of())
    torch.testing.assert_close(_logits(loaded), ours, rtol=0, atol=TOLERANCE)
    assert (ours - base).abs().max() > 100 * TOLERANCE


def test_an_adapter_that_peft_saved_loads(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=LoRAConfig(rank=4, alpha=6.0, target_modules=["q_proj", "o_proj"]))
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    theirs = get_peft_model(_theirs(engine.config.path), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "adapter")
    load_lora_adapter(engine, tmp_path / "adapter")
    torch.testing.assert_close(engine.forward(batch_of()), _logits(theirs), rtol=0, atol=TOLERANCE)


def test_transformers_loads_a_whole_model(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=None)
    train(engine, 2)
    engine.save(SaveLoadMeta(path=tmp_path / "out"))
    torch.testing.assert_close(
        _logits(_theirs(str(tmp_path / "out"))),
        engine.forward(batch_of()),
        rtol=0,
        atol=TOLERANCE,
    )
