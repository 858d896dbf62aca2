"""``ckpt import`` and ``ckpt export --format dcp``: output, JSON, exit statuses, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import stock
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner, Result

from ckpt.catalog import find_step
from ckpt.cli_commands import app
from ckpt.peft import write_adapter_dir
from ckpt.storage import open_storage
from ckpt.versions import list_versions

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ckpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def one_line(result: Result, status: int) -> str:
    assert result.exit_code == status, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def source(tmp_path: Path) -> Path:
    sd: dict[str, Any] = stock.state_dict(*stock.model_and_optimizer())
    return stock.save({**sd, "note": "text"}, tmp_path / "stock")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    weights = {
        f"base_model.model.lin.lora_{side}.weight": torch.ones(shape)
        for side, shape in (("A", (2, 6)), ("B", (8, 2)))
    }
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["lin"],
        "bias": "none",
    }
    write_adapter_dir(tmp_path / "adapter", weights, config)
    return tmp_path / "adapter"


class TestImport:
    def test_a_checkpoint(self, source: Path, tmp_path: Path) -> None:
        result = ckpt("import", source, tmp_path / "root", "--step", 5, "--skip", "note")
        assert result.exit_code == 0, result.output
        lines = [line.split() for line in result.stdout.splitlines()]
        assert ["imported", "step", "5", "(writer", "1)"] in lines
        assert lines[-1] == ["left", "out", "note"]
        assert find_step(open_storage(tmp_path / "root")).step == 5

    def test_a_checkpoint_as_json(self, source: Path, tmp_path: Path) -> None:
        result = ckpt("import", source, tmp_path / "root", "--json")
        document = json.loads(result.stdout)
        assert document["path"] == "steps/step-00000000.w0001"
        assert (document["tensors"], document["skipped"]) == (16, [])

    def test_an_adapter(self, adapter: Path, tmp_path: Path) -> None:
        result = ckpt("import", adapter, tmp_path / "root", "--run", "base", "--dtype", "bfloat16")
        assert result.exit_code == 0, result.output
        assert "base-v00000001" in result.stdout
        assert ckpt("verify", tmp_path / "root").exit_code == 0
        document = json.loads(ckpt("import", adapter, tmp_path / "root", "--json").stdout)
        assert (document["version"], document["dtype"]) == ("run-v00000001", "float32")
        names = [entry.name for entry in list_versions(open_storage(tmp_path / "root"))]
        assert names == ["base-v00000001", "run-v00000001"]

    def test_neither(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        error = one_line(ckpt("import", tmp_path / "empty", tmp_path / "root"), 2)
        assert "no checkpoint that is known here: DCP (.metadata), verl (model_world" in error

    def test_nothing_there(self, tmp_path: Path) -> None:
        one_line(ckpt("import", tmp_path / "none", tmp_path / "root"), 3)

    def test_options_of_the_other_kind(self, source: Path, adapter: Path, tmp_path: Path) -> None:
        error = one_line(ckpt("import", source, tmp_path / "root", "--run", "x"), 2)
        assert "--run: not for a source of the kind DCP" in error
        error = one_line(ckpt("import", adapter, tmp_path / "root", "--skip", "x"), 2)
        assert "--skip: not for a source of the kind PEFT" in error

    def test_a_root_with_steps(self, source: Path, tmp_path: Path) -> None:
        assert ckpt("import", source, tmp_path / "root").exit_code == 0
        assert "holds steps" in one_line(ckpt("import", source, tmp_path / "root"), 2)

    def test_a_malicious_one(self, source: Path, tmp_path: Path) -> None:
        evil = stock.Touch(tmp_path / "ran")
        stock.change_metadata(source, lambda md: setattr(md, "version", evil))
        error = one_line(ckpt("import", source, tmp_path / "root"), 1)
        assert "mkdir" in error
        assert not (tmp_path / "ran").exists()

    def test_a_damaged_one(self, source: Path, tmp_path: Path) -> None:
        (source / ".metadata").write_bytes(b"\x80\x04]")
        error = one_line(ckpt("import", source, tmp_path / "root"), 1)
        assert "cannot be read as DCP metadata" in error
        assert "ckpt verify" not in error


class TestExport:
    @pytest.fixture
    def root(self, source: Path, tmp_path: Path) -> Path:
        assert ckpt("import", source, tmp_path / "root", "--step", 3).exit_code == 0
        return tmp_path / "root"

    def test_a_step(self, root: Path, tmp_path: Path) -> None:
        result = ckpt("export", root, tmp_path / "out", "--format", "dcp")
        assert result.exit_code == 0, result.output
        assert result.stdout.split()[:5] == ["exported", "step", "3", "(writer", "1)"]
        live = {"model": {"0.weight": torch.zeros(4, 3)}}
        dcp.load(live, checkpoint_id=tmp_path / "out")
        assert torch.equal(live["model"]["0.weight"], stock.model_and_optimizer()[0][0].weight)

    def test_as_json(self, root: Path, tmp_path: Path) -> None:
        result = ckpt("export", root, tmp_path / "out", "--format", "dcp", "--json")
        document = json.loads(result.stdout)
        assert (document["format"], document["tensors"]) == ("dcp", 16)

    def test_errors(self, root: Path, tmp_path: Path) -> None:
        command = ("export", root, tmp_path / "out", "--format", "dcp")
        assert "--format peft" in one_line(ckpt(*command, "--dtype", "float32"), 2)
        assert "no step 9" in one_line(ckpt(*command, "--step", 9), 2)
        assert "exists already" in one_line(ckpt("export", root, root, "--format", "dcp"), 2)
        assert "URL" in one_line(ckpt("export", root, "s3://b/x", "--format", "dcp"), 2)
        one_line(ckpt("export", tmp_path / "none", tmp_path / "out", "--format", "dcp"), 3)
        shard = next(root.rglob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        assert "damaged" in one_line(ckpt(*command), 1)

    def test_a_step_of_another_kind(self, tmp_path: Path) -> None:
        write_step(open_storage(tmp_path / "hand"), 1, tiny_adapter()[0])
        one_line(ckpt("export", tmp_path / "hand", tmp_path / "out", "--format", "dcp"), 1)
