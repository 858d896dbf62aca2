"""Sources that are refused, by name: incomplete, ambiguous, or more than is understood here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ckpt import CheckpointManager, TrainState
from ckpt.cli_commands import app
from ckpt.errors import ConfigError, DamagedError, NoCheckpoint, StateError
from ckpt.migrate.torchtune import read_torchtune
from ckpt.migrate.verl import find_verl, import_verl
from ckpt.peft import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ckpt(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer


def verl_files(folder: Path, **files: Any) -> Path:
    """One rank's files of verl in a role's directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, value in files.items():
        torch.save(value, folder / f"{kind}_world_size_1_rank_0.pt")
    return folder


def take(folder: Path, root: Path) -> Any:
    found = find_verl(folder)
    assert found is not None
    return import_verl(found, str(root))


class TestVerl:
    def test_a_fully_tuned_model_goes_on(self, tmp_path: Path) -> None:
        model = torch.nn.Linear(3, 2)
        optimizer = adamw(model)
        step = verl_files(
            tmp_path / "global_step_5/actor", model=model.state_dict(), optim=optimizer.state_dict()
        )
        result = ckpt("import", step.parent, tmp_path / "root", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["step"] == 5
        again = torch.nn.Linear(3, 2)
        live = torch.optim.AdamW(again.parameters(), lr=0.5)
        with CheckpointManager(tmp_path / "root") as manager:
            assert manager.restore(TrainState(again, live)) == 5
        assert torch.equal(again.weight, model.weight)
        saved = optimizer.state[model.weight]
        assert torch.equal(live.state[again.weight]["exp_avg"], saved["exp_avg"])
        assert live.param_groups[0]["lr"] == 0.1

    def test_a_tied_head_is_taken_once(self, tmp_path: Path) -> None:
        model = torch.nn.ModuleDict(
            {"embed": torch.nn.Linear(3, 2), "lm_head": torch.nn.Linear(3, 2)}
        )
        model["lm_head"].weight = model["embed"].weight
        optimizer = torch.optim.AdamW(model.parameters())
        model["lm_head"](torch.ones(1, 3)).sum().backward()
        optimizer.step()
        folder = verl_files(
            tmp_path / "actor", model=model.state_dict(), optim=optimizer.state_dict()
        )
        with pytest.raises(StateError, match="which is which cannot be told"):
            take(folder, tmp_path / "a")
        (folder / "huggingface").mkdir()
        (folder / "huggingface/config.json").write_text('{"tie_word_embeddings": true}')
        assert take(folder, tmp_path / "b").skipped == ("lm_head.weight",)
        with CheckpointManager(tmp_path / "b") as manager:
            assert manager.restore(TrainState(model, optimizer)) == 0

    def test_files_of_a_rank_are_missing(self, tmp_path: Path) -> None:
        folder = tmp_path / "actor"
        folder.mkdir()
        torch.save({}, folder / "model_world_size_2_rank_1.pt")
        with pytest.raises(NoCheckpoint, match=r"model_world_size_2_rank_0\.pt"):
            find_verl(folder)
        torch.save({}, folder / "model_world_size_4_rank_0.pt")
        with pytest.raises(NoCheckpoint, match=r"several world sizes \(2, 4\)"):
            find_verl(folder)

    def test_a_run_asks_for_one_of_its_steps(self, tmp_path: Path) -> None:
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("20")
        (tmp_path / "global_step_20").mkdir()
        error = ckpt("import", tmp_path, tmp_path / "root").stderr
        assert "name one of its steps: global_step_20" in error

    def test_a_class_of_someone_elses_is_named(self, tmp_path: Path) -> None:
        folder = verl_files(tmp_path / "actor", model={"w": torch.ones(2), "x": Path("a")})
        with pytest.raises(StateError, match=r"names pathlib\S*\.PosixPath"):
            take(folder, tmp_path / "root")

    def test_an_optimizer_of_another_model_is_refused(self, tmp_path: Path) -> None:
        optimizer = adamw(torch.nn.Linear(3, 2))
        model = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
        folder = verl_files(tmp_path / "actor", model=model, optim=optimizer.state_dict())
        with pytest.raises(StateError, match="the optimizer numbers 2 parameters"):
            take(folder, tmp_path / "root")

    def test_a_model_that_is_no_mapping_of_tensors(self, tmp_path: Path) -> None:
        with pytest.raises(DamagedError, match="holds a list"):
            take(verl_files(tmp_path / "a", model=[1]), tmp_path / "root")
        with pytest.raises(StateError, match="w is a int, want a tensor"):
            take(verl_files(tmp_path / "b", model={"w": 1}), tmp_path / "root")


def tune_file(folder: Path, tensors: dict[str, torch.Tensor], *, kind: str = "llama") -> Path:
    """An adapter of torchtune's beside its base model's configuration."""
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "adapter_model.pt")
    config = {"model_type": kind, "num_attention_heads": 4, "num_key_value_heads": 2}
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 16}))
    return folder / "adapter_model.pt"


def tune_adapter() -> dict[str, torch.Tensor]:
    """Query and down projections of one layer, r = 2."""
    shapes = {"attn.q_proj": (16, 16), "attn.k_proj": (8, 16), "mlp.w2": (16, 24)}
    found = {}
    for name, (out, into) in shapes.items():
        found[f"layers.0.{name}.lora_a.weight"] = torch.randn(2, into)
        found[f"layers.0.{name}.lora_b.weight"] = torch.randn(out, 2)
    return found


class TestTorchtune:
    def test_names_and_rows_become_pefts(self, tmp_path: Path) -> None:
        tune = tune_adapter()
        ours = {name: tensor.clone() for name, tensor in tune.items()}
        for name, heads in (("q_proj", 4), ("k_proj", 2)):
            b = tune[f"layers.0.attn.{name}.lora_b.weight"]
            # HuggingFace's rows as torchtune takes them over: pairs from two halves.
            pairs = b.view(heads, 2, 2, 2).transpose(1, 2).reshape(b.shape)
            tune[f"layers.0.attn.{name}.lora_b.weight"] = pairs
        path = tune_file(tmp_path / "tune", tune)
        result = ckpt("import", path, tmp_path / "root", "--alpha", 16, "--json")
        assert result.exit_code == 0, result.output
        config, tensors = read_adapter(tmp_path / "root" / json.loads(result.stdout)["path"])
        assert (config["r"], config["lora_alpha"]) == (2, 16)
        assert config["target_modules"] == ["down_proj", "k_proj", "q_proj"]
        head = "base_model.model.model.layers.0."
        for there, here in (
            ("self_attn.q_proj", "attn.q_proj"),
            ("self_attn.k_proj", "attn.k_proj"),
            ("mlp.down_proj", "mlp.w2"),
        ):
            for side in "AB":
                mine = ours[f"layers.0.{here}.lora_{side.lower()}.weight"]
                assert torch.equal(tensors[f"{head}{there}.lora_{side}.weight"], mine), there

    def test_qwen2_keeps_its_rows(self, tmp_path: Path) -> None:
        tune = tune_adapter()
        path = tune_file(tmp_path / "tune", tune, kind="qwen2")
        _, tensors = read_torchtune(path, alpha=8, base_config=None)
        found = tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
        assert torch.equal(found, tune["layers.0.attn.q_proj.lora_b.weight"])

    def test_alpha_comes_from_torchtunes_own_configuration(self, tmp_path: Path) -> None:
        path = tune_file(tmp_path / "tune", tune_adapter())
        assert "--alpha 16" in ckpt("import", path.parent, tmp_path / "root").stderr
        (path.parent / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
        (path.parent / "recipe_state.pt").write_bytes(b"")
        done = ckpt("import", path.parent, tmp_path / "root")
        assert done.exit_code == 0
        assert re.search(r"left out\s+recipe_state\.pt", done.stdout)

    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("layers.0.attn.q_proj.magnitude", (16,)),
            ("layers.0.attn.qkv.lora_a.weight", (2, 16)),
            ("layers.0.mlp.experts.lora_gate_a", (2, 2, 16)),
        ],
    )
    def test_what_is_no_known_factor_is_named(
        self, tmp_path: Path, name: str, shape: tuple[int, ...]
    ) -> None:
        path = tune_file(tmp_path / "tune", tune_adapter() | {name: torch.ones(shape)})
        with pytest.raises(StateError, match=name):
            read_torchtune(path, alpha=8, base_config=None)

    def test_a_family_whose_rows_are_not_known(self, tmp_path: Path) -> None:
        path = tune_file(tmp_path / "tune", tune_adapter(), kind="phi3")
        with pytest.raises(ConfigError, match="model_type 'phi3'"):
            read_torchtune(path, alpha=8, base_config=None)
        with pytest.raises(ConfigError, match="--base-config PATH"):
            read_torchtune(path, alpha=8, base_config=tmp_path / "none.json")

    def test_options_of_steps_mean_nothing_here(self, tmp_path: Path) -> None:
        path = tune_file(tmp_path / "tune", tune_adapter())
        error = ckpt("import", path, tmp_path / "root", "--step", 1).stderr
        assert "--step: not for a source of the kind torchtune" in error


def test_a_file_of_another_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    assert "x.pt is no adapter_model.pt" in ckpt("import", tmp_path / "x.pt", tmp_path / "r").stderr


def test_a_step_of_prime_rl_with_a_data_position_missing(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    from ckpt.migrate.prime_rl import find_prime_rl, import_prime_rl

    trainer = tmp_path / "step_3/trainer"
    dcp.save({"app": {"model": {"w": torch.ones(2)}}}, checkpoint_id=str(trainer), no_dist=True)
    (trainer / "dataloader").mkdir()
    torch.save({"at": 1}, trainer / "dataloader/rank_1.pt")
    found = find_prime_rl(tmp_path / "step_3")
    assert found == trainer
    with pytest.raises(NoCheckpoint, match=r"rank_0\.pt is missing"):
        import_prime_rl(found, str(tmp_path / "root"))
    torch.save({"at": 0}, trainer / "dataloader/rank_0.pt")
    assert import_prime_rl(found, str(tmp_path / "root")).manifest.step == 3


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("areal", ["--model", "dcp.model", "--optim", "dcp.optim"]),
        ("torchtitan", ["--model", "", "--skip", "dataloader"]),
    ],
)
def test_whole_checkpoints_of_areal_and_torchtitan(
    tmp_path: Path, layout: str, options: list[str]
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    optimizer = adamw(model)
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    weights = get_model_state_dict(model)
    moments = get_optimizer_state_dict(model, optimizer, options=flat)
    saved: dict[str, Any] = {"dcp": {"model": weights, "optim": moments}}
    if layout == "torchtitan":
        saved = weights | {"optimizer": moments, "train_state": {"step": 7}, "dataloader": {"a": 1}}
    dcp.save(saved, checkpoint_id=str(tmp_path / "theirs"))
    done = ckpt("import", tmp_path / "theirs", tmp_path / "root", "--step", 7, *options)
    assert done.exit_code == 0, done.output
    again = torch.nn.Sequential(torch.nn.Linear(3, 2))
    live = torch.optim.AdamW(again.parameters())
    with CheckpointManager(tmp_path / "root") as manager:
        assert manager.restore(TrainState(again, live)) == 7
    assert torch.equal(again[0].weight, model[0].weight)
    expected = optimizer.state[model[0].weight]["exp_avg"]
    assert torch.equal(live.state[again[0].weight]["exp_avg"], expected)


def test_names_that_are_not_prime_rls(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    trainer = tmp_path / "trainer"
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=str(trainer), no_dist=True)
    error = ckpt("import", trainer, tmp_path / "root").stderr
    assert "not laid out as prime-rl does it: 'model.w' is not below 'app'" in error
