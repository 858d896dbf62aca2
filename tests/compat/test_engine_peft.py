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

from archon_lora import get_adapter_state_dict, peft_export
from archon_lora.config import LoRAConfig
from archon_lora.engine import (
    ArchonEngine,
    SaveLoadMeta,
    load_lora_adapter,
    save_lora_adapter,
    warm_start,
)
from ckpt import BaseMismatch, CheckpointManager, StateError

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


@pytest.mark.parametrize("case", CASES)
def test_a_warm_start_from_what_peft_saved_computes_as_peft_does(
    engine_of, tmp_path: Path, case: str
) -> None:
    lora = CASES[case]
    engine = engine_of(lora=lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if case != "all-linear":
        config.target_modules = list(peft_export(engine.model)["peft_config"]["target_modules"])
    theirs = get_peft_model(_theirs(engine.config.path), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    taken = warm_start(engine, tmp_path / "adapter")
    assert not taken.verified
    torch.testing.assert_close(engine.forward(batch_of()), _logits(theirs), rtol=0, atol=TOLERANCE)


SERVED = {  # published forms are checked against what engines load
    "all-linear": CASES["all-linear"],
    "patterns": CASES["patterns"],
    "rslora": LoRAConfig(rank=3, alpha=5.0, use_rslora=True),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_warm_start_from_a_published_version_gives_the_adapter_back(
    engine_of, tmp_path: Path, case: str
) -> None:
    """The published form has one padded rank and the scaling inside B."""
    engine = engine_of(lora=SERVED[case])
    train(engine, 2)
    want = engine.forward(batch_of())
    with CheckpointManager(tmp_path / "run", publish_dtype="float32") as manager:
        name = manager.publish(engine.train_state()).published.result(30).name
    before = get_adapter_state_dict(engine.model, full=True)
    fresh = engine_of(lora=SERVED[case], seed=5)
    taken = warm_start(fresh, tmp_path / "run" / "adapters" / name)
    assert (taken.version, taken.verified, taken.notes) == (name, True, ())
    torch.testing.assert_close(fresh.forward(batch_of()), want, rtol=0, atol=1e-6)
    for key, value in get_adapter_state_dict(fresh.model, full=True).items():
        # One rounding where the scaling is no power of two, none elsewhere.
        torch.testing.assert_close(value, before[key], rtol=2.0**-23, atol=0)


def test_a_warm_start_from_another_base_or_alpha_is_refused(engine_of, tmp_path: Path) -> None:
    engine = engine_of(lora=LoRAConfig(rank=4, alpha=8.0))
    save_lora_adapter(engine, tmp_path / "adapter", "models/elsewhere")
    with pytest.raises(BaseMismatch, match="models/elsewhere"):
        warm_start(engine, tmp_path / "adapter")
    other = engine_of(lora=LoRAConfig(rank=4, alpha=20.0))
    with pytest.raises(StateError, match=r"is scaled by 2 .*the live adapter by 5"):
        warm_start(other, tmp_path / "adapter", any_base=True)
    warm_start(other, tmp_path / "adapter", any_base=True, rescale=True)
    want = engine.forward(batch_of())
    torch.testing.assert_close(other.forward(batch_of()), want, rtol=0, atol=1e-6)


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
