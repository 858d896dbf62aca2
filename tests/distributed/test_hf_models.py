"""HuggingFace models on two ranks: PEFT under FSDP2 and DDP, own adapters, others' checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft")
pytest.importorskip("transformers")

from support import ranks_hf
from support.spawn import run_ranks

from ckpt.peft_config import plain_key

pytestmark = [
    pytest.mark.dist,
    pytest.mark.compat,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

Results = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks' answers, and where they wrote."""
    root = tmp_path_factory.mktemp("hf")
    answers = run_ranks(2, ranks_hf.everything, root, timeout=240)
    return root, answers  # type: ignore[return-value]  # what everything() returns


def of(results: Results, part: str) -> list[dict[str, Any]]:
    return [answers[part] for answers in results[1]]


KINDS = ["peft_fsdp2", "peft_accelerate", "applied_fsdp2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(results: Results, kind: str) -> None:
    for rank in of(results, kind):
        assert rank["restored"] == 1
        assert rank["resumed"] == rank["went_on"]
        assert rank["same_weights"]
        assert rank["position"] == 4


@pytest.mark.parametrize("kind", ["peft_fsdp2", "peft_accelerate"])
def test_names_are_those_of_the_unwrapped_model(results: Results, kind: str) -> None:
    names = of(results, kind)[0]["names"]
    head = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default.weight"
    assert f"model.{head}" in names
    assert f"optim.{head}.exp_avg_sq" in names
    assert not any("module." in name or "base_layer" in name for name in names)


@pytest.mark.parametrize(
    ("kind", "folder"), [("peft_fsdp2", "fsdp2"), ("peft_accelerate", "accelerate")]
)
def test_the_version_holds_the_gathered_adapter_and_loads_in_peft(
    results: Results, kind: str, folder: str
) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    version = next((results[0] / folder / "adapters").glob("run-v*/"))
    found = load_file(version / "adapter_model.safetensors")
    adapter = of(results, kind)[0]["adapter"]
    assert {plain_key(name) for name in adapter} == found.keys()
    for name, value in adapter.items():
        assert torch.equal(found[plain_key(name)], value), name
    loaded = PeftModel.from_pretrained(ranks_hf.llama(), str(version))
    state = get_peft_model_state_dict(loaded)
    assert state.keys() == found.keys()
    assert all(torch.equal(state[key], found[key]) for key in found)


def test_own_adapters_on_a_transformers_model_compute_the_same_in_peft(results: Results) -> None:
    from peft import PeftModel

    from archon_lora import LoRAConfig, apply_lora
    from ckpt import CheckpointManager, TrainState

    root = results[0] / "applied"
    version = next((root / "adapters").glob("run-v*/"))
    model = ranks_hf.llama()
    apply_lora(model, LoRAConfig(rank=ranks_hf.RANK, alpha=8, target_modules=["q_proj", "v_proj"]))
    with CheckpointManager(root) as manager:  # on one rank, what two had saved
        assert manager.restore(TrainState(model), parts={"model"}) == 1
    loaded = PeftModel.from_pretrained(ranks_hf.llama(), str(version))
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        expected = model.eval()(ids).logits
        torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, ranks_hf.llama().eval()(ids).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["verl", "verl_lora_only"])
def test_a_run_of_verl_goes_on_bit_for_bit(results: Results, kind: str) -> None:
    for rank in of(results, kind):
        assert rank["restored"] == 12, "verl's own number"
        assert rank["resumed"] == rank["went_on"]
        assert rank["extra"] == {"global_step": 12}


def test_verls_frozen_base_is_left_out_and_said_so(results: Results) -> None:
    skipped = of(results, "verl")[0]["skipped"]
    assert "base_model.model.lm_head.weight" in skipped
    assert not any("lora_" in name for name in skipped)
    assert of(results, "verl_lora_only")[0]["skipped"] == ()


def test_an_imported_step_of_verl_can_be_exported(results: Results, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ckpt.cli_commands import app

    out = tmp_path / "out"
    words = ["export", str(results[0] / "verl/ours"), str(out), "--dtype", "float32"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (ranks_hf.RANK, 8)
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    keys = load_file(out / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys


def test_a_run_of_prime_rl_goes_on_bit_for_bit(results: Results) -> None:
    for rank in of(results, "prime_rl"):
        assert rank["restored"] == 7
        assert rank["resumed"] == rank["went_on"]
        assert rank["position"] == 3
        assert rank["extra"]["progress"]["step"] == 2
