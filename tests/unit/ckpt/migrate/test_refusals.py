"""What an import refuses, it names, and nothing lies at the root afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import sources, stock
from typer.testing import CliRunner

from ckpt.cli_commands import app

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

MODEL, OPTIMIZER = stock.model_and_optimizer()
Q = "layers.0.attn.q_proj"


def ranks(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> Path:
    """Models of two ranks of verl."""
    (folder / "actor").mkdir(parents=True)
    for rank, model in enumerate((first, second)):
        torch.save(model, folder / f"actor/model_world_size_2_rank_{rank}.pt")
    return folder


def optim(**changes: Any) -> dict[str, Any]:
    return OPTIMIZER.state_dict() | changes


def without_kind() -> dict[str, Any]:
    """Groups that do not tell which optimizer they are from."""
    state = OPTIMIZER.state_dict()
    for group in state["param_groups"]:
        group.pop("decoupled_weight_decay")
    return state


def dcp_with(folder: Path, **more: Any) -> Path:
    return stock.save(stock.state_dict(MODEL, OPTIMIZER) | more, folder)


def two_tunes(folder: Path) -> Path:
    sources.torchtune(folder)
    shutil.copy(folder / "adapter_model.pt", folder / "adapter_1.pt")
    return folder


def without_weights(folder: Path) -> Path:
    sources.peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    return folder


def of_two_dtypes(folder: Path) -> Path:
    sources.peft(folder)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2).half()}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def without_a_rank(folder: Path) -> Path:
    sources.prime_rl(folder)
    data = folder / "trainer/dataloader"
    (data / "rank_0.pt").rename(data / "rank_1.pt")
    return folder


def tune(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Query projections of rank 2 with other tensors."""
    whole = {"lora_a": torch.ones(2, 8), "lora_b": torch.ones(8, 2)} | tensors
    return {f"{Q}.{name}.weight": tensor for name, tensor in whole.items()}


MESH: dict[str, Any] = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8}

CASES: dict[str, tuple[Callable[[Path], Path], str, list[str]]] = {
    "verl: a class of someone else's": (
        lambda p: sources.verl(p, model={"w": Path("x")}), "PosixPath", []),
    "verl: FSDP1's flat parameters": (
        lambda p: sources.verl(p, model={"w": torch.nn.ModuleDict()}), "torch.nn.modules", []),
    "verl: a model of something else than tensors": (
        lambda p: sources.verl(p, model={"w": 1}), "w is a int, want a tensor", []),
    "verl: no dictionary": (lambda p: sources.verl(p, model=[1]), "holds a list", []),
    "verl: ranks that differ in names": (
        lambda p: ranks(p, {"w": torch.ones(2)}, {"v": torch.ones(2)}), "differ in: v, w", []),
    "verl: ranks that differ in a dtype": (
        lambda p: ranks(p, {"w": torch.ones(2)}, {"w": torch.ones(2).half()}),
        "on rank 0 it is another", []),
    "verl: an optimizer without state": (
        lambda p: sources.verl(p, optim=optim(state=3)), "no state of an optimizer", []),
    "verl: an optimizer without groups": (
        lambda p: sources.verl(p, optim=optim(param_groups=3)), "no groups of an optimizer", []),
    "verl: an optimizer that is not named": (
        lambda p: sources.verl(p, optim=without_kind()), "name it: --optimizer AdamW", []),
    "verl: an optimizer of another model": (
        lambda p: sources.verl(p, model={"w": torch.ones(2)}), "which is which cannot be told", []),
    "verl: random states of another kind": (
        lambda p: sources.verl(p, extra_state={"rng": {"cpu": 1}}),
        "rng is not what verl saves", []),
    "verl: an option of adapters": (sources.verl, "--alpha: not for a source", ["--alpha", "1"]),
    "torchtune: no alpha": (sources.torchtune, "--alpha 16", []),
    "torchtune: two adapters": (two_tunes, "name one of the files", ["--alpha", "1"]),
    "torchtune: a factor that is not known": (
        lambda p: sources.torchtune(p, tune(magnitude=torch.ones(8))),
        f"{Q}.magnitude.weight: no A or B", ["--alpha", "1"]),
    "torchtune: A and B do not fit": (
        lambda p: sources.torchtune(p, tune(lora_a=torch.ones(3, 8))), "have different ranks",
        ["--alpha", "1"]),
    "torchtune: rows that are no heads": (
        lambda p: sources.torchtune(p, rows=10), "has 10 rows, 2 heads of 4 want 8",
        ["--alpha", "1"]),
    "torchtune: another family": (
        lambda p: sources.torchtune(p, config=MESH | {"model_type": "phi3"}), "'phi3'",
        ["--alpha", "1"]),
    "torchtune: heads that are none": (
        lambda p: sources.torchtune(p, config=MESH | {"num_attention_heads": "2"}),
        "head counts and size must be integers", ["--alpha", "1"]),
    "torchtune: no dictionary": (
        lambda p: sources.torchtune(p, [1]), "holds a list", ["--alpha", "1"]),
    "torchtune: a step's option": (
        sources.torchtune, "--step: not for a source", ["--step", "1"]),
    "prime-rl: laid out otherwise": (
        lambda p: sources.prime_rl(p, "other"), "is not below 'app'", []),
    "prime-rl: a data position is missing": (without_a_rank, "rank_0.pt is missing", []),
    "PEFT: no weights": (without_weights, "adapter_model", []),
    "PEFT: DoRA": (lambda p: sources.peft(p, use_dora=True), "use_dora", []),
    "PEFT: whole modules beside": (
        lambda p: sources.peft(p, modules_to_save=["lm_head"]), "modules_to_save", []),
    "PEFT: another kind": (lambda p: sources.peft(p, peft_type="IA3"), "IA3", []),
    "PEFT: tensors of a rank that is not told": (
        lambda p: sources.peft(p, r=4), "rank", []),
    "PEFT: two dtypes": (of_two_dtypes, "name a --dtype", []),
    "DCP: a value without a place": (
        lambda p: dcp_with(p, ema={"w": torch.zeros(200, 200)}), "--skip ema.w", []),
    "DCP: no model of that name": (dcp_with, "--model", ["--model", "net"]),
    "DCP: an option of adapters": (dcp_with, "--run: not for a source", ["--run", "x"]),
    "an empty directory": (lambda p: p.mkdir() or p, "no checkpoint that is known here", []),
    "nothing": (lambda p: p, "no such directory", []),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name_before_anything_is_written(case: str, tmp_path: Path) -> None:
    make, words, options = CASES[case]
    source, root = make(tmp_path / "global_step_5"), tmp_path / "root"
    done = CliRunner().invoke(app, ["import", str(source), str(root), *options])
    assert done.exit_code in (1, 2, 3), done.output
    assert words in " ".join(done.stderr.split())
    assert [path for path in root.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("make", [sources.verl, sources.prime_rl, dcp_with])
def test_a_root_that_has_steps_is_left_as_it_is(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    words = ["import", str(make(tmp_path / "global_step_5")), str(tmp_path / "root")]
    assert CliRunner().invoke(app, words).exit_code == 0
    held = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    again = CliRunner().invoke(app, [*words, "--step", "9"])
    assert again.exit_code == 2
    assert "holds steps already" in again.stderr
    now = {path: path.read_bytes() for path in (tmp_path / "root").rglob("*") if path.is_file()}
    assert now == held
