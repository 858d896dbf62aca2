"""What every command of ``archon-lora`` says and returns, also as JSON: one table over all."""

from __future__ import annotations

import json
import os
import pty
import socket
import sys
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from support.archon_cli import SECRET, Told, caller
from typer.testing import CliRunner

from archon_lora import cli_commands as cli
from archon_lora.errors import ArchonLoraError
from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl import loop
from archon_lora.rl.demo import run as demo_run
from archon_lora.rl.demo.report import Report
from ckpt.errors import StorageError

COMMANDS = {"train": ["{tmp}/c.toml"], "make-tiny": ["{tmp}/m"], "demo": ["--out", "{tmp}/d"]}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Told]:
    return caller(monkeypatch, capsys)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("m") / "tiny", std=0.1)


def config(tmp_path: Path, tiny: Path, root: str | None = None, extra: str = "") -> Path:
    path = tmp_path / "c.toml"
    path.write_text(
        f'[run]\nsteps = 2\nmetrics = "{tmp_path}/metrics.jsonl"\n[model]\npath = "{tiny}"\n'
        f"[rollout]\nprompts_per_step = 2\ngroup_size = 2\n[checkpoint]\n"
        f'root = "{root or tmp_path / "root"}"\n{extra}'
    )
    return path


def test_no_command_is_forgotten() -> None:
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_statuses_mean(
    run: Callable[..., Told], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    told = run(name, "--help")
    assert told.status == 0
    assert "3 the store failed; 143 a SIGTERM" in told.out
    assert "--json" in told.out


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_wrong_option(run: Callable[..., Told], name: str, more: list[str]) -> None:
    told = run(name, "--no-such-option", *more)
    told.refused(2, "--no-such-option", f"`archon-lora {name} --help`")
    assert bool(told.out) == bool(more)


@pytest.mark.parametrize("name", ["make-tiny", "demo"])
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_place_that_cannot_be_written(
    run: Callable[..., Told], name: str, more: list[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    told = run(name, *(["--out"] if name == "demo" else []), place, *more)
    told.refused(3, f"{place}: Not a directory", "check the path")
    assert bool(told.out) == bool(more)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("archon-lora make", "make-tiny"), ("archon-lora train --print", "--print-config")],
)
def test_a_shell_can_complete(typed: str, offered: str) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    environment = {"_ARCHON_LORA_COMPLETE": "complete_bash", **words}
    result = CliRunner(env=environment).invoke(cli.app, [])
    assert result.exit_code == 0, result.output
    assert offered in result.stdout.split()


def test_a_number_that_makes_no_model(run: Callable[..., Told], tmp_path: Path) -> None:
    run("make-tiny", tmp_path / "m", "--std", "nan").refused(2, "--std", "above 0, got nan")
    run("make-tiny", tmp_path / "m", "--layers", "0", "--json").refused(2, ">= 1, got 0")


def test_an_s3_endpoint_that_refuses_connections(
    run: Callable[..., Told], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", nowhere)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    told = run("train", config(tmp_path, tiny, "s3://bucket/run7"))
    told.refused(3, "s3://bucket/run7", nowhere, "checkpoint.storage_options and AWS_ENDPOINT_URL")


def test_an_error_of_several_lines_is_one(
    run: Callable[..., Told], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_config: object, **_more: object) -> None:
        error = ArchonLoraError("first\nsecond")
        error.add_note("a note")
        raise error

    monkeypatch.setattr(loop, "run_training", broken)
    run("train", config(tmp_path, tiny), "--json").refused(1, "first second; a note")


def test_a_full_disk_has_the_status_of_a_store(
    run: Callable[..., Told], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_config: object, **_more: object) -> None:
        raise StorageError(f"{tmp_path}: write failed: No space left on device")

    monkeypatch.setattr(loop, "run_training", full)
    run("train", config(tmp_path, tiny)).refused(3, "No space left", "the space on its disk")


def test_make_tiny_as_json(run: Callable[..., Told], tmp_path: Path) -> None:
    told = run("make-tiny", tmp_path / "m", "--layers", "1", "--json")
    assert (told.status, told.err) == (0, "")
    made = json.loads(told.out)
    assert made["directory"] == str(tmp_path / "m")
    assert made["layers"] == 1
    assert set(made["files"]) == {path.name for path in (tmp_path / "m").iterdir()}


def test_train_as_json_is_the_metrics_as_they_come(
    run: Callable[..., Told], tmp_path: Path, tiny: Path
) -> None:
    told = run("train", config(tmp_path, tiny), "--json")
    assert (told.status, told.err) == (0, "")
    assert told.out == (tmp_path / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in told.out.splitlines()]
    assert [row.get("step", row.get("event")) for row in rows] == ["start", 0, 1, "end"]


def test_the_settings_as_json(run: Callable[..., Told], tmp_path: Path, tiny: Path) -> None:
    path = config(tmp_path, tiny)
    told = run("train", path, "--print-config", "--json")
    assert json.loads(told.out) == tomllib.loads(run("train", path, "--print-config").out)


@pytest.mark.parametrize("passed", [True, False])
def test_the_demonstration_as_json(
    run: Callable[..., Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: bool
) -> None:
    def shown(_out: object, _settings: object, *, console: Any) -> Report:
        console.print("a phase")
        report = Report()
        report.check("it works", "so and so", passed=passed)
        return report

    monkeypatch.setattr(demo_run, "run_demo", shown)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    told = run("demo", "--out", tmp_path, "--json")
    assert told.status == (0 if passed else 1)
    assert json.loads(told.out)["passed"] is passed
    assert told.err == "a phase\n"


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_bar_on_a_terminal_unless_json_is_asked_for(
    run: Callable[..., Told],
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    mine, theirs = pty.openpty()
    drawn = bytearray()

    def read() -> None:
        try:
            while data := os.read(mine, 65536):
                drawn.extend(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        told = run("train", config(tmp_path, tiny), *more)
    reader.join(30)
    os.close(mine)
    assert told.status == 0
    assert (b"\x1b[" in drawn) != bool(more)
    assert (b"reward" in drawn) != bool(more)
    assert "\x1b[" not in told.out
