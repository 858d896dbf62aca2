"""Settings from a file and the environment, and what ``--print-config`` says of them."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.storage import open_storage


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def ckpt(*arguments: object, **environment: str) -> Result:
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    storage = open_storage(root)
    tensors, export = tiny_adapter()
    for step in range(4):
        write_step(storage, step, tensors, export=export)
    write_writer(storage, 1)
    return root


def kept(result: Result) -> int:
    assert result.exit_code == 0, result.output
    return sum(entry["keep"] for entry in json.loads(result.stdout)["entries"])


def test_the_command_line_beats_the_environment_beats_the_file(root: Path) -> None:
    Path("ckpt.toml").write_text("[prune]\nkeep_latest = 1\n")
    prune = ("prune", root, "--dry-run", "--json")
    assert kept(ckpt(*prune)) == 1
    assert kept(ckpt(*prune, CKPT_PRUNE_KEEP_LATEST="2")) == 2
    assert kept(ckpt(*prune, "--keep-latest", 3, CKPT_PRUNE_KEEP_LATEST="2")) == 3


def test_a_file_that_is_named(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("[prune]\nkeep_latest = 2\n")
    prune = ("prune", root, "--dry-run", "--json")
    assert kept(ckpt("--config", file, *prune)) == 2
    assert kept(ckpt(*prune, CKPT_CONFIG=str(file))) == 2


def test_a_setting_before_the_tables_is_that_of_every_command(tmp_path: Path) -> None:
    Path("ckpt.toml").write_text('endpoint_url = "http://127.0.0.1:9"\n[ls]\nendpoint_url = "x"\n')
    said = tomllib.loads(ckpt("--print-config").stdout)
    assert said["verify"]["endpoint_url"] == "http://127.0.0.1:9"
    assert said["ls"]["endpoint_url"] == "x"


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    result = ckpt("--print-config", CKPT_PRUNE_KEEP_LATEST="7", CKPT_LINT_STRICT="1")
    assert result.exit_code == 0, result.output
    assert "keep_latest = 7  # from the environment" in result.stdout
    Path("ckpt.toml").write_text(result.stdout)
    again = ckpt("--print-config")
    assert again.exit_code == 0, again.output
    assert tomllib.loads(again.stdout) == tomllib.loads(result.stdout)
    assert tomllib.loads(again.stdout)["lint"]["strict"] is True


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[purge]\na = 1\n", "[purge] is no command; there are consolidate, diff"),
        ("[prune]\nlatest = 1\n", "[prune] has no option 'latest'; there are "),
        ("latest = 1\n", "'latest' is an option of no command"),
        ("[ls]\njson = true\n", "[ls] has no option 'json'"),
        ("= 1\n", "is not a TOML file"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(root: Path, text: str, said: str) -> None:
    Path("ckpt.toml").write_text(text)
    result = ckpt("ls", root)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_value_that_its_option_does_not_take() -> None:
    result = ckpt("--print-config", CKPT_PRUNE_KEEP_LATEST="many")
    assert result.exit_code == 2
    assert "[prune] keep_latest, from the environment" in result.stderr


def test_a_file_that_is_named_must_be_there() -> None:
    result = ckpt("--config", "none.toml", "--print-config")
    assert result.exit_code == 2
    assert "no such configuration file: none.toml" in result.stderr


def test_a_command_must_be_named() -> None:
    Path("ckpt.toml").write_text("")
    result = ckpt("--config", "ckpt.toml")
    assert result.exit_code == 2
    assert "name a command" in result.stderr


@pytest.mark.parametrize(("typed", "offered"), [("ckpt pru", "prune"), ("ckpt lint --fo", "--for")])
def test_a_shell_can_complete(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = ckpt(_CKPT_COMPLETE="complete_bash", **words)
    assert result.exit_code == 0, result.output
    assert offered in result.stdout.split()
