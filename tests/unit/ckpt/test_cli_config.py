"""Settings from a file and the environment, and what ``--print-config`` says of them."""

from __future__ import annotations

import enum
import json
import os
import subprocess
import sys
import tomllib
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from support.steps import tiny_adapter, write_step, write_writer
from typer.testing import CliRunner, Result

from ckpt.cli_commands import app
from ckpt.cli_config import options
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


def every_option() -> list[tuple[str, str, bool, Any]]:
    """Of each: the command, its name in a file, whether it may be repeated, and a value for it."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
    found = []
    for info in app.registered_commands:
        assert info.name is not None
        assert info.callback is not None
        hints = typing.get_type_hints(info.callback)
        found += [
            (info.name, key, option.multiple, a_value(hints[str(option.name)]))
            for key, option in options(commands[info.name])
        ]
    return found


def a_value(hint: Any) -> Any:
    """Something that an option of this type takes and that is nobody's default."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind = typing.get_args(kinds[0])[0] if typing.get_origin(kinds[0]) is list else kinds[0]
    if issubclass(kind, enum.Enum):
        return [one.value for one in kind][-1]
    return {bool: True, int: 7, float: 7.5}.get(kind, "text")


def test_every_option_of_every_command_can_be_set_by_its_variable() -> None:
    variables = {
        f"CKPT_{name}_{key}".upper().replace("-", "_"): str(value)
        for name, key, _multiple, value in every_option()
    }
    result = ckpt("--print-config", **variables)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    unset = [line for line in lines if line and line[0] != "[" and "environment" not in line]
    assert unset == []
    assert sum("from the environment" in line for line in lines) == len(variables)


def test_every_option_of_every_command_can_be_set_by_a_file() -> None:
    lines: dict[str, list[str]] = {}
    for name, key, multiple, value in every_option():
        text = json.dumps([value] if multiple else value)
        lines.setdefault(name, []).append(f"{key} = {text}")
    file = [line for name, rows in lines.items() for line in (f"[{name}]", *rows)]
    Path("ckpt.toml").write_text("\n".join(file))
    result = ckpt("--print-config")
    assert result.exit_code == 0, result.output
    shown = result.stdout.splitlines()
    assert [line for line in shown if line and line[0] != "[" and "the file" not in line] == []
    assert len([line for line in shown if "from the file" in line]) == len(every_option())


@pytest.mark.parametrize(
    ("command", "variable"),
    [("lint", "CKPT_LINT_FOR"), ("export", "CKPT_EXPORT_FORMAT"), ("inspect", "CKPT_INSPECT_ALL")],
)
def test_help_names_the_variable_of_an_option(command: str, variable: str) -> None:
    assert f"[env var: {variable}]" in " ".join(
        ckpt(command, "--help", COLUMNS="300").stdout.split()
    )


@pytest.mark.s3
def test_a_profile_of_aws_is_honoured(
    s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3.url("profile")
    tensors, export = tiny_adapter()
    write_step(open_storage(url, s3.storage_options), 5, tensors, export=export)
    for name in s3.environment:
        monkeypatch.delenv(name, raising=False)
    key, secret = s3.environment["AWS_ACCESS_KEY_ID"], s3.environment["AWS_SECRET_ACCESS_KEY"]
    (tmp_path / "config").write_text(
        f"[profile lab]\nregion = us-east-1\nendpoint_url = {s3.endpoint_url}\n"
    )
    (tmp_path / "credentials").write_text(
        f"[lab]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    found = ckpt("ls", url, "--json", AWS_PROFILE="lab")
    assert found.exit_code == 0, found.output
    assert [step["step"] for step in json.loads(found.stdout)["steps"]] == [5]
    wrong = ckpt("ls", url, AWS_PROFILE="nobody")
    assert wrong.exit_code in {2, 3}, wrong.output
    assert "nobody" in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
    assert secret not in wrong.output


@pytest.mark.parametrize(("typed", "offered"), [("ckpt pru", "prune"), ("ckpt lint --fo", "--for")])
def test_a_shell_can_complete(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    result = ckpt(_CKPT_COMPLETE="complete_bash", **words)
    assert result.exit_code == 0, result.output
    assert offered in result.stdout.split()


@pytest.mark.slow
def test_a_real_bash_completes(tmp_path: Path) -> None:
    """The script that is installed, sourced and called as bash does at a press of TAB."""
    command = tmp_path / "ckpt"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckpt.cli "$@"\n')
    command.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    script = ckpt(_CKPT_COMPLETE="source_bash").stdout
    function = script.partition("()")[0].strip()
    press = f"{script}\nCOMP_WORDS=(ckpt pru)\nCOMP_CWORD=1\n{function} ckpt\n"
    done = subprocess.run(
        ["bash", "-c", press + 'echo "${COMPREPLY[@]}"'],
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["prune"], done.stderr
