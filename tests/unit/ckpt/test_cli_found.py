"""What commands say of a place that is not the root of a run: what it is, and what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.publishers import publish
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner

from ckpt.cli_commands import app
from ckpt.storage import open_storage

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by stock DCP

VERSION = "run7-v00000001"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``runs`` with the root ``runs/kinds``, and what other programs write."""
    home = tmp_path_factory.mktemp("home")
    root = home / "runs" / "kinds"
    tensors, export = tiny_adapter()
    write_step(open_storage(root), 10, tensors, export=export)
    publish(str(root), "run7")
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=home / "stock", no_dist=True)
    dcp.save({"app": {"w": torch.ones(2)}}, checkpoint_id=home / "prime/trainer", no_dist=True)
    for name, file in (
        ("adapter", "adapter_config.json"),
        ("model", "config.json"),
        ("verl", "model_world_size_1_rank_0.pt"),
        ("verl-run", "latest_checkpointed_iteration.txt"),
    ):
        (home / name).mkdir()
        (home / name / file).write_text("{}")
    (home / "empty").mkdir()
    return home


PLACES = [
    ("stock", "it is a checkpoint of stock DCP; `ckpt import {place} ROOT` takes it over"),
    ("prime", "it is a checkpoint of prime-rl; `ckpt import {place} ROOT` takes it over"),
    ("verl", "it is a checkpoint of verl; `ckpt import {place} ROOT` takes it over"),
    ("verl-run", "is a run of verl; name one of its steps"),
    ("adapter", "it is a PEFT adapter; `ckpt lint {place}` looks at it, and `ckpt import {place}"),
    ("model", "it is a model (config.json); name the directory that its training saves to"),
    ("runs", "there are some in it; name one of them: kinds"),
    ("runs/kinds/steps", "it lies in one; name {home}/runs/kinds"),
    ("runs/kinds/steps/step-00000010.w0001", "it lies in one; name {home}/runs/kinds"),
    ("runs/kinds/adapters/" + VERSION, "it lies in one; name {home}/runs/kinds"),
]


@pytest.mark.parametrize(("place", "said"), PLACES)
@pytest.mark.parametrize("command", ["ls", "verify", "prune --keep-latest 1"])
def test_a_directory_that_is_something_else(
    home: Path, place: str, said: str, command: str
) -> None:
    name, *more = command.split()
    result = CliRunner().invoke(app, [name, str(home / place), *more])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ckpt: {home / place} is no root of a run: ")
    assert said.format(home=home, place=home / place) in line


def test_a_root_that_is_empty_yet(home: Path) -> None:
    result = CliRunner().invoke(app, ["ls", str(home / "empty")])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"no steps and no versions in {home / 'empty'}"


def test_our_own_root_needs_no_import(home: Path) -> None:
    root = home / "runs" / "kinds"
    result = CliRunner().invoke(app, ["import", str(root), str(home / "new")])
    assert result.exit_code == 2
    assert f"{root} is the root of a run already" in result.stderr
    assert not (home / "new").exists()


@pytest.mark.parametrize("target", ["stock", "runs", "adapter"])
def test_an_import_makes_no_root_of_something_else(home: Path, target: str) -> None:
    before = sorted(path.name for path in (home / target).iterdir())
    result = CliRunner().invoke(app, ["import", str(home / "stock"), str(home / target)])
    assert result.exit_code == 2
    assert f"{home / target} is no root of a run: " in result.stderr
    assert sorted(path.name for path in (home / target).iterdir()) == before


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_url_with_one_slash(scheme: str) -> None:
    result = CliRunner().invoke(app, ["ls", f"{scheme}:/bucket/run7"])
    assert result.exit_code == 3
    assert f"{scheme}:/bucket/run7 is no URL; write {scheme}:// with two slashes" in result.stderr


def test_the_runs_that_have_versions(home: Path) -> None:
    root = str(home / "runs" / "kinds")
    result = CliRunner().invoke(app, ["versions", root, "--run", "rum7"])
    assert result.exit_code == 0
    assert result.stdout.strip() == f"no such versions in {root}, but of run7"
    assert json.loads(CliRunner().invoke(app, ["versions", root, "--run", "rum7", "--json"]).stdout)
    wrong = CliRunner().invoke(app, ["versions", root, "--newer-than", "v7"])
    assert wrong.exit_code == 2
    assert "got 'v7'" in wrong.stderr
