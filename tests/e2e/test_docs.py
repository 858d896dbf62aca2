"""Code blocks of the guides run as they are printed.

A fence's info string says what is done with a block:

- ``python run``: executed. The blocks of a document share their names, and a directory.
- ``console run``: lines after ``$ `` are run there; what follows is their output, in which ``...``
  stands for anything. A command whose comment says ``exits 1`` has to end so, any other with 0.
- ``python of PATH``: an excerpt: its lines stand in that file of the repository, in this order.

``<!-- stand-in: areal -->`` in a document lets it import the tests' stand-in for AReaL. In the
how-tos every Python block must be of one of these kinds, and our commands in ``sh`` blocks have to
parse.
"""

from __future__ import annotations

import random
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from ckpt.cli_commands import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("docker/*.md")])
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STAND_IN = re.compile(r"<!-- stand-in: (\w+) -->")
SITES = {"areal": ROOT / "tests/support/areal_site"}

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
]


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    info: tuple[str, ...]
    text: str
    line: int


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    return [
        Block(tuple(match[1].split()), match[2], text.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(text)
    ]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


RUNNABLE = [p for p in DOCUMENTS if any("run" in b.info[1:] for b in blocks_of(p))]
EXCERPTS = [(p, b) for p in DOCUMENTS for b in blocks_of(p) if b.info[1:2] == ("of",)]
HOWTOS = [path for path in DOCUMENTS if path.parent.name == "howto"]


@pytest.mark.parametrize("path", RUNNABLE, ids=named)
def test_blocks_run_as_printed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    for name in STAND_IN.findall(path.read_text("utf-8")):
        monkeypatch.syspath_prepend(str(SITES[name]))
    # What examples draw must not depend on, or change, what other tests draw.
    state = random.getstate()
    names: dict[str, Any] = {"__name__": "example"}
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            torch.manual_seed(0)
            for block in blocks_of(path):
                if block.info[:2] == ("python", "run"):
                    # Empty lines first, so that a traceback shows the document's own lines.
                    code = "\n" * block.line + block.text
                    exec(compile(code, str(path), "exec"), names)
                elif block.info[:2] == ("console", "run"):
                    run_console(block, path, tmp_path)
    finally:
        random.setstate(state)
        for module in set(sys.modules) - before:
            if module.partition(".")[0] in SITES:
                del sys.modules[module]


def run_console(block: Block, path: Path, folder: Path) -> None:
    """Run each command and compare what it says."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, wanted = part.partition("\n")
        words = shlex.split(command, comments=True)
        status = int(found[1]) if (found := re.search(r"# exits (\d)", command)) else 0
        if words[0] == "ckpt":
            done = CliRunner().invoke(app, words[1:])
            code, said = done.exit_code, done.output
        else:
            assert words[0] in ("python", "archon-lora"), f"{named(path)}: {words[0]} is not run"
            module = [] if words[0] == "python" else ["-m", "archon_lora.cli"]
            ended = subprocess.run(
                [sys.executable, *module, *words[1:]],
                cwd=folder,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            code, said = ended.returncode, ended.stdout
        assert code == status, f"{named(path)}:{block.line}: {command}\n{said}"
        assert matches(wanted, said), f"{named(path)}:{block.line}: {command} said\n{said}"


def matches(wanted: str, said: str) -> bool:
    """Whether an output is the printed one, white space aside, ``...`` for anything."""
    parts = [" ".join(part.split()) for part in wanted.strip().split("...")]
    pattern = ".*".join(re.escape(part) for part in parts)
    return re.fullmatch(pattern, " ".join(said.split())) is not None or not wanted.strip()


@pytest.mark.parametrize(
    ("path", "block"), EXCERPTS, ids=lambda v: named(v) if isinstance(v, Path) else ""
)
def test_an_excerpt_stands_in_its_file(path: Path, block: Block) -> None:
    source = (ROOT / block.info[2]).read_text("utf-8").splitlines()
    for line in filter(None, block.text.splitlines()):
        assert line in source, (
            f"{named(path)}:{block.line}: {block.info[2]} has no line {line!r} here"
        )
        source = source[source.index(line) + 1 :]


@pytest.mark.parametrize("path", HOWTOS, ids=named)
def test_python_in_a_howto_is_run_or_an_excerpt(path: Path) -> None:
    loose = [b.line for b in blocks_of(path) if b.info[:1] == ("python",) and len(b.info) == 1]
    assert loose == []


@pytest.mark.parametrize("path", HOWTOS, ids=named)
def test_our_commands_in_a_howto_parse(path: Path) -> None:
    group = typer.main.get_command(app)
    for block in blocks_of(path):
        lines = block.text.splitlines() if block.info[:1] == ("sh",) else []
        for words in (shlex.split(line, comments=True) for line in lines):
            if words[:1] == ["ckpt"]:
                command = group.commands[words[1]]
                command.make_context(words[1], words[2:])
            elif words[:1] == ["torchrun"]:
                script = next(word for word in words if word.endswith(".py"))
                assert (ROOT / script).is_file()


def test_there_is_something_to_run() -> None:
    assert {"docs/howto/trl.md", "docs/howto/torchtitan.md"} <= set(map(named, RUNNABLE))
    assert len(EXCERPTS) >= 4


def test_outputs_are_compared() -> None:
    assert matches("a ... c\n", "a b\n c")
    assert not matches("a ... c\n", "a b d")
