"""Ctrl-C: one line, the status that shells know, and nothing left behind."""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner

import archon_lora.models.tiny
from archon_lora import cli_commands as training
from ckpt import cli_commands, consolidate
from ckpt.storage import open_storage


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("entry", "name"), [("ckpt.cli", "ckpt"), ("archon_lora.cli", "archon-lora")]
)
def test_ctrl_c_while_the_commands_are_loaded(
    entry: str, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def interrupted(what: str, *rest: Any, **named: Any) -> Any:
        if what == "cli_commands":
            raise KeyboardInterrupt
        return real(what, *rest, **named)

    module = importlib.import_module(entry)
    monkeypatch.setattr(sys, "argv", [name, "--version"])
    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == f"{name}: interrupted\n"


def test_ctrl_c_in_the_middle_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, places = tmp_path / "root", tmp_path / "places"
    tensors, export = tiny_adapter()
    write_step(open_storage(root), 10, tensors, export=export)
    real = consolidate.stream_adapter

    def some(*arguments: Any) -> Iterator[memoryview]:
        yield next(real(*arguments))
        assert list(places.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(consolidate, "stream_adapter", some)
    places.mkdir()
    result = CliRunner().invoke(cli_commands.app, ["export", str(root), str(places / "out")])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "ckpt: interrupted\n"
    assert list(places.iterdir()) == []


def test_ctrl_c_in_the_other_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archon_lora.models.tiny, "write_tiny_qwen2", interrupt)
    monkeypatch.setenv("RANK", "1")
    result = CliRunner().invoke(training.app, ["make-tiny", str(tmp_path / "m")])
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "archon-lora [rank 1]: interrupted\n"
