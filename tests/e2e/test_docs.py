"""Code blocks of the guides run as they are printed.

A fence's info string says what is done with a block:

- ``python run``: executed. The blocks of a document share their names, and a directory.
- ``console run``: lines after ``$ `` are run there; what follows is their output, in which ``...``
  stands for anything. A command whose comment says ``exits 1`` has to end so, any other with 0.
- ``sh background``: the command runs until the document ends. Its ports are replaced by free ones,
  wherever the document names them.
- ``LANGUAGE file NAME``: that file.
- ``python of PATH``: an excerpt: its lines stand in that file of the repository, in this order.

``<!-- stand-in: areal -->`` in a document lets it import the tests' stand-in for AReaL, and
``vllm`` there has one answer for vLLM with the model ``tiny-qwen2``. In the how-tos every Python
block must be of one of these kinds. Elsewhere what is not run has to parse, and to name what there
is; so have our commands in shell blocks.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from support.fake_engine import FakeEngine
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
HOWTOS = [p for p in DOCUMENTS if p.parent.name == "howto" or p.name == "tutorial.md"]
OURS = ("ckpt", "archon_lora")
ADDRESS = re.compile(r"127\.0\.0\.1:\d+")


@pytest.mark.parametrize("path", RUNNABLE, ids=named)
def test_blocks_run_as_printed(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    stand_ins = STAND_IN.findall(path.read_text("utf-8"))
    for name in set(stand_ins) & SITES.keys():
        monkeypatch.syspath_prepend(str(SITES[name]))
    # What examples draw must not depend on, or change, what other tests draw.
    state = random.getstate()
    names: dict[str, Any] = {"__name__": "example"}
    addresses: dict[str, str] = {}
    try:
        with torch.random.fork_rng(), warnings.catch_warnings(), ExitStack() as running:
            torch.manual_seed(0)
            for printed in blocks_of(path):
                block = replace(printed, text=moved(printed.text, addresses))
                if block.info[:2] == ("python", "run"):
                    # Empty lines first, so that a traceback shows the document's own lines.
                    code = "\n" * block.line + block.text
                    exec(compile(code, str(path), "exec"), names)
                elif block.info[:2] == ("console", "run"):
                    run_console(block, path, tmp_path)
                elif block.info[1:2] == ("file",):
                    (tmp_path / block.info[2]).write_text(block.text, "utf-8")
                elif block.info == ("sh", "background"):
                    addresses |= free_addresses(block)
                    if "vllm+http" in block.text and "vllm" in stand_ins:
                        engine = FakeEngine("vllm", model=tmp_path / "tiny-qwen2")
                        addresses["127.0.0.1:8000"] = running.enter_context(engine).url[7:]
                    start_background(block, addresses, running)
    finally:
        random.setstate(state)
        for module in set(sys.modules) - before:
            if module.partition(".")[0] in SITES:
                del sys.modules[module]


def moved(text: str, addresses: dict[str, str]) -> str:
    """The text with addresses replaced."""
    return ADDRESS.sub(lambda match: addresses.get(match[0], match[0]), text)


def free_addresses(block: Block) -> dict[str, str]:
    """A free address of loopback for each that a block names."""
    found = {}
    for address in ADDRESS.findall(block.text):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            found[address] = f"127.0.0.1:{probe.getsockname()[1]}"
    return found


def start_background(block: Block, addresses: dict[str, str], running: ExitStack) -> None:
    """Start a block's one command of ours, which ends with ``running``."""
    words = shlex.split(moved(block.text, addresses))
    assert words[0] == "ckpt", f"{words[0]} is not run"
    log = running.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 - the stack closes it
    process = subprocess.Popen(
        [sys.executable, "-m", "ckpt.cli", *words[1:]], stdout=log, stderr=log
    )
    running.callback(process.wait, 30)
    running.callback(process.terminate)
    listen = words[words.index("--listen") + 1].rpartition(":")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection((listen[0], int(listen[2])), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    log.seek(0)
    raise AssertionError(f"{block.text} does not listen: {log.read().decode()}")


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
                stdout=subprocess.PIPE,
                # Where the training tells of its steps.
                stderr=subprocess.STDOUT if module else None,
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


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_python_that_is_not_run_uses_names_and_arguments_that_exist(path: Path) -> None:
    """Fragments cannot run, as they leave out what the reader has."""
    loose = [b for b in blocks_of(path) if b.info == ("python",)]
    # Public names count as imported: a fragment may leave that out.
    packages = [importlib.import_module(name) for name in OURS]
    imported = {name: getattr(home, name) for home in packages for name in home.__all__}
    for block in loose:
        for node in ast.walk(ast.parse("\n" * block.line + block.text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] in OURS:
                home = importlib.import_module(str(node.module))
                for alias in node.names:
                    imported[alias.asname or alias.name] = getattr(home, alias.name)
    for block in loose:
        for node in ast.walk(ast.parse("\n" * block.line + block.text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in imported:
                known = inspect.signature(imported[node.func.id]).parameters
                unknown = {word.arg for word in node.keywords if word.arg} - set(known)
                assert not unknown, f"{named(path)}:{node.lineno}: {node.func.id} has no {unknown}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_our_commands_parse(path: Path) -> None:
    group = typer.main.get_command(app)
    for block in blocks_of(path):
        shell = block.info in ((), ("sh",), ("sh", "background"), ("console",))
        text = re.sub(r"\\\n\s*", " ", block.text) if shell else ""
        for line in text.splitlines():
            if not re.match(r"(\$ )?(ckpt|torchrun) ", line):
                continue
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[0] == "ckpt" and words[1] != "--print-config":
                command = group.commands[words[1]]
                command.make_context(words[1], words[2:])
            elif words[0] == "torchrun":
                script = next((word for word in words if word.endswith(".py")), "docs")
                assert (ROOT / script).exists()


def test_there_is_something_to_run() -> None:
    wanted = {"docs/howto/trl.md", "docs/howto/torchtitan.md", "docs/tutorial.md"}
    assert wanted <= set(map(named, RUNNABLE))
    assert len(EXCERPTS) >= 4


def test_outputs_are_compared() -> None:
    assert matches("a ... c\n", "a b\n c")
    assert not matches("a ... c\n", "a b d")
