"""What a person sees on a terminal while a command works, and that nobody else sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
import typer
from rich.filesize import decimal
from support.publishers import two_steps_and_a_version
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner

from ckpt import cli_commands, cli_progress
from ckpt.consolidate import consolidate
from ckpt.layout import MANIFEST
from ckpt.peft import WEIGHTS_NAME
from ckpt.storage import open_storage
from ckpt.tier import Tier

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # by stock DCP

VERSION = "run7-v00000001"
ESCAPE = "\x1b["


class Terminal:
    """The other end of a pseudo terminal: gathers all that is drawn."""

    def __init__(self) -> None:
        self._mine, theirs = pty.openpty()
        self.file = os.fdopen(theirs, "w")
        self._drawn = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(self._mine, 65536):
                self._drawn += data

    def drawn(self) -> str:
        """All of it, after which there is no terminal any more."""
        self.file.close()
        self._reader.join(30)
        os.close(self._mine)
        return self._drawn.decode()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return two_steps_and_a_version(tmp_path / "root")


@pytest.fixture
def places(root: Path, tmp_path: Path) -> dict[str, str]:
    tier = tmp_path / "tier"
    Tier(tier, str(root))
    tensors, export = tiny_adapter()
    write_step(open_storage(tier), 30, tensors, export=export)
    stock = tmp_path / "stock"
    dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=stock, no_dist=True)
    return {
        "root": str(root),
        "tmp": str(tmp_path),
        "tier": str(tier),
        "stock": str(stock),
        "adapter": str(root / "adapters" / VERSION),
    }


CALLS = [
    ("reading", "ls {root}"),
    ("reading", "inspect {root}"),
    ("verifying", "verify {root}"),
    ("exporting", "export {root} {tmp}/a"),
    ("exporting", "consolidate {root} {tmp}/a"),
    ("exporting", "export {root} {tmp}/a --version " + VERSION),
    ("importing", "import {stock} {tmp}/new"),
    ("importing", "import {adapter} {root} --run other"),
    ("linting", "lint {adapter}"),
    ("reading", "versions {root}"),
    ("waiting", "versions {root} --wait 5"),
    ("publishing", "publish {root}"),
    ("pruning", "prune {root} --keep-latest 1"),
    ("looking", "prune {root} --keep-latest 1 --dry-run"),
    ("mirroring", "mirror {root} {tier}"),
    ("trying", "doctor {root} --size 1"),
    ("comparing", "diff {root} 10 20"),
]
"""What is going on, and the call. ``pin`` and ``unpin`` are done at once; what ``sync`` and
``serve`` do is in their log."""


def test_no_command_is_forgotten() -> None:
    commands = typer.main.get_command(cli_commands.app).commands  # type: ignore[attr-defined]
    shown = {call.split()[0] for _what, call in CALLS}
    assert shown == set(commands) - {"pin", "unpin", "sync", "serve"}


@contextlib.contextmanager
def streams(out: io.TextIOBase, err: io.TextIOBase) -> Iterator[None]:
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):  # type: ignore[type-var]
        yield


@pytest.mark.parametrize(("what", "call"), CALLS)
def test_a_bar_on_a_terminal_and_clean_output_beside_it(
    what: str, call: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["ckpt", *call.format(**places).split()])
    terminal, out = Terminal(), io.StringIO()
    with streams(out, terminal.file):  # type: ignore[arg-type]  # a file is one
        status = cli_commands.run()
    drawn = terminal.drawn()
    assert status in {0, 1}, drawn  # lint finds what it may
    assert what in drawn
    assert ESCAPE in drawn
    assert out.getvalue()
    assert ESCAPE not in out.getvalue()


@pytest.mark.parametrize(("what", "call"), CALLS)
def test_nothing_of_it_with_json(
    what: str, call: str, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["ckpt", *call.format(**places).split(), "--json"])
    terminal, out = Terminal(), io.StringIO()
    with streams(out, terminal.file):  # type: ignore[arg-type]  # a file is one
        status = cli_commands.run()
    drawn = terminal.drawn()
    assert status in {0, 1}, drawn
    assert what not in drawn
    assert ESCAPE not in drawn
    json.loads(out.getvalue())


@pytest.mark.parametrize(
    ("call", "reads"), [("verify {root} --step 20", 1), ("export {root} {tmp}/a --version {v}", 2)]
)
def test_a_bar_that_knows_its_end_reaches_it(
    call: str, reads: int, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "argv", ["ckpt", *call.format(v=VERSION, **places).split()])
    terminal, out = Terminal(), io.StringIO()
    with streams(out, terminal.file):  # type: ignore[arg-type]  # a file is one
        assert cli_commands.run() == 0
    directory = "adapters/" + VERSION if reads == 2 else "steps/step-00000020.w0001"
    files = [f for f in Path(places["root"], directory).iterdir() if f.name != MANIFEST]
    total = decimal(reads * sum(file.stat().st_size for file in files))
    assert f"{total} of {total}" in terminal.drawn()


def test_a_bar_that_does_not_know_its_end_counts_all_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    storage = open_storage(root)
    terminal, path = Terminal(), f"adapters/{VERSION}/{MANIFEST}"
    with (
        streams(io.StringIO(), terminal.file),  # type: ignore[arg-type]  # a file is one
        cli_progress.watching("reading", storage, total=0, as_json=False),
    ):
        count = len(storage.read(path))
    assert decimal(count) in terminal.drawn()


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_colours_for_a_pipe_are_no_pictures_that_move(
    variable: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    result = CliRunner().invoke(cli_commands.app, ["verify", str(root)])
    assert result.exit_code == 0
    assert result.stderr == ""


def test_a_terminal_that_cannot_move_its_cursor(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys, "argv", ["ckpt", "verify", str(root)])
    terminal, out = Terminal(), io.StringIO()
    with streams(out, terminal.file):  # type: ignore[arg-type]  # a file is one
        assert cli_commands.run() == 0
    assert terminal.drawn() == ""


def test_an_export_counts_every_byte_of_the_weights(root: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    consolidate(
        root, 20, tmp_path / "out", on_bytes=lambda count, total: told.append((count, total))
    )
    (total,) = {total for _count, total in told}
    assert sum(count for count, _total in told) == total
    assert total == (tmp_path / "out" / WEIGHTS_NAME).stat().st_size


@pytest.mark.slow
def test_the_program_in_a_terminal(root: Path) -> None:
    """A process of its own, its output in a pipe and its errors on a terminal, as in a shell."""
    terminal = Terminal()
    done = subprocess.run(
        [sys.executable, "-m", "ckpt.cli", "verify", str(root)],
        stdout=subprocess.PIPE,
        stderr=terminal.file,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"},
        timeout=120,
        check=True,
    )
    drawn = terminal.drawn()
    assert "verifying" in drawn
    assert ESCAPE in drawn
    assert "every byte verifies" in done.stdout
    assert ESCAPE not in done.stdout
