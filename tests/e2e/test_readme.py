"""The README's example runs as printed, twice, and the second run goes on from the first."""

from __future__ import annotations

import contextlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from ckpt.cli_commands import app

README = Path(__file__).parents[2] / "README.md"

pytestmark = pytest.mark.e2e


def example() -> str:
    """The one Python block of the README."""
    blocks = re.findall(
        r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 1
    return str(blocks[0])


def run(folder: Path) -> str:
    """Run the example as a script in ``folder``; its standard output."""
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands() -> list[list[str]]:
    """What the README has one type into a shell, word by word, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", README.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_commands_are_ones_that_there_are() -> None:
    group = typer.main.get_command(app)
    ours = [words[1:] for words in commands() if words[:1] == ["ckpt"]]
    assert {words[0] for words in ours} >= {"versions", "lint", "sync"}
    for name, *words in ours:
        command = group.commands[name]
        command.make_context(name, words)  # parses, runs nothing


def test_example_is_about_twenty_lines() -> None:
    assert sum(bool(line.strip()) for line in example().splitlines()) <= 20


def test_example_runs_and_resumes(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(example(), encoding="utf-8")
    assert run(tmp_path) == "went from step 0 to 9\n"
    assert run(tmp_path) == "went from step 10 to 19\n"

    adapters = sorted(p for p in (tmp_path / "runs/first/adapters").iterdir() if p.is_dir())
    assert len(adapters) == 4, "steps 4, 9, 14 and 19 were published"
    for folder in adapters:
        names = {p.name for p in folder.iterdir()}
        assert names == {"MANIFEST.json", "adapter_config.json", "adapter_model.safetensors"}

    said = commands()
    (serve,) = (words for words in said if words[:2] == ["ckpt", "serve"])
    with served(serve, tmp_path) as port:
        for words in said:
            if words[:2] not in (["ckpt", "versions"], ["ckpt", "lint"]):
                continue
            done = subprocess.run(
                [*CKPT, *(word.replace(":8080/", f":{port}/") for word in words[1:])],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )
            shown = done.stdout
            assert done.returncode == (words[1] == "lint"), done.stderr  # SGLang's objection
            assert ("sglang: refused" if words[1] == "lint" else "run-v00000004") in shown


CKPT = [sys.executable, "-m", "ckpt.cli"]


@contextlib.contextmanager
def served(words: list[str], folder: Path) -> Iterator[int]:
    """The service that the README starts, on a port of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [*CKPT, *words[1:], "--listen", f"127.0.0.1:{port}"]
    service = subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert service.poll() is None, "the service ended"
            assert time.monotonic() < deadline, "the service does not answer"
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield port
    finally:
        service.terminate()
        assert service.wait(30) in {0, -signal.SIGTERM}
