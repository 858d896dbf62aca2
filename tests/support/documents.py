"""The code blocks of the documents, and what running each kind of them means.

- ``python``: executed. The blocks of a document share their names, and a directory.
- ``python of PATH``: an excerpt: its lines stand in that file of the repository, in this order.
- ``LANGUAGE file NAME``: that file, for the blocks that follow.
- ``console``, or ``$ `` in front of commands: each is run; what follows is its output, in which
  ``...`` stands for anything. A comment ``exits 1`` tells a status that is not 0.
- ``sh``: each command is run, or held to what would refuse it: see :data:`CHECKED`. ``ckpt serve``
  and ``ckpt sync`` run until the document ends, in a transcript until they have begun.
- ``toml``: what ``ckpt`` reads as its configuration. ``json`` and ``yaml``: see the scenes.
- ``text``: no code.

Anything else fails. A place that a reader has, such as ``s3://bucket``, is replaced by one of the
test's (:attr:`Stage.places`), wherever a document names it.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from unittest import mock

import yaml
from typer.testing import CliRunner

from archon_lora import cli_commands as training
from ckpt.cli_commands import app
from support.pages import ROOT, Block, Scene, Stage, blocks_of, named, nothing
from support.warm_start import start

ASSIGNED = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)
LISTEN = {"serve": "127.0.0.1:8080", "sync": "127.0.0.1:9101"}
FOREIGN = ("AWS_", "VLLM_")
"""Variables of other programs begin so."""

CHECKED = {
    "archon-lora train": "takes minutes; run by tests/e2e/test_main_job.py and the tutorial. Here "
    "its file and options are read as it reads them",
    "torchrun": "starts ranks; tests/e2e/test_examples.py and test_main_job.py run the same on "
    "ranks that start faster. Here the program reads its arguments",
    "pip": "the tests' environment is not to be changed; extras and project are compared",
    "make": "a target is a run of its own; that there is one of this name is looked up",
    "python -m benchmarks": "takes minutes; tests/e2e/test_benchmarks.py runs small ones. Here its "
    "arguments are read",
}
"""Commands that are not run in ``sh`` blocks, and why."""


def run_document(path: Path, stage: Stage, scene: Scene, left_out: frozenset[str]) -> None:
    """Run a document's blocks, but those whose first line is in ``left_out``."""
    scene.begin(stage)
    for block in blocks_of(path):
        if block.first in left_out or block.kind == "text":
            continue
        scene.before.get(block.first, nothing)(stage)
        where = f"{named(path)}:{block.line}"
        assert block.kind in KINDS, f"{where}: {block.kind!r} is not run; list it with the reason"
        KINDS[block.kind](block, stage, where)
    scene.end(stage)


# -- Python and files --------------------------------------------------------------------------


def run_python(block: Block, stage: Stage, where: str) -> None:
    # Empty lines first, so that a traceback shows the document's own lines.
    code = "\n" * block.line + stage.own(block.text)
    with suppress(*filter(None, [stage.enough])):
        exec(compile(code, where, "exec"), stage.names)


def check_excerpt(block: Block, _stage: Stage, where: str) -> None:
    source = (ROOT / block.info[2]).read_text("utf-8").splitlines()
    for line in filter(None, block.text.splitlines()):
        assert line in source, f"{where}: {block.info[2]} has no line {line!r} here"
        source = source[source.index(line) + 1 :]


def write_file(block: Block, stage: Stage, _where: str) -> None:
    (stage.folder / block.info[2]).write_text(block.text, "utf-8")


def load_toml(block: Block, stage: Stage, where: str) -> None:
    """As the configuration of ``ckpt``: each setting is taken from it."""
    path = stage.folder / "documented.toml"
    path.write_text(block.text, "utf-8")
    done = CliRunner().invoke(app, ["--config", str(path), "--print-config"])
    assert done.exit_code == 0, f"{where}: {done.output}"
    stage.read.append(tomllib.loads(block.text))
    count = sum(len(v) if isinstance(v, dict) else 1 for v in stage.read[-1].values())
    taken = sum(line.endswith("# from the file") for line in done.output.splitlines())
    assert taken >= count, f"{where}: not every setting was taken:\n{done.output}"


def keep_text(block: Block, stage: Stage, _where: str) -> None:
    """JSON, which the scene holds to what reads it."""
    stage.read.append(block.text)


def load_yaml(block: Block, stage: Stage, _where: str) -> None:
    stage.read.append(yaml.safe_load(block.text))


# -- commands ----------------------------------------------------------------------------------


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """Each command with the output that is printed after it."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    if block.kind == "console":
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, wanted = part.partition("\n")
            yield command, wanted
    else:
        yield from ((line, "") for line in text.splitlines() if line.strip(" #"))


def run_commands(block: Block, stage: Stage, where: str) -> None:
    for command, wanted in commands_of(block):
        words = shlex.split(stage.own(command), comments=True)
        words = [word for word in words if word != "2>/dev/null"]
        while words and (found := ASSIGNED.fullmatch(words[0])):
            set_variable(found[1], found[2], stage, where)
            words.pop(0)
        if not words:
            continue
        run = COMMANDS.get(words[0])
        assert run, f"{where}: {words[0]} is not run; list the block with the reason"
        expected = re.search(r"# exits (\d)", command)
        status = int(expected[1]) if expected else stage.statuses.get(command, 0)
        code, said = run(words, stage, block.kind)
        stage.said[command] = said
        assert code == status, f"{where}: {command}\nended with {code} and said\n{said}"
        assert matches(stage.own(wanted), said, shaped=stage.shaped), (
            f"{where}: {command} said\n{said}"
        )


def set_variable(name: str, value: str, stage: Stage, where: str) -> None:
    assert name.startswith(FOREIGN) or name in sources(), f"{where}: nothing reads {name}"
    stage.patch.setenv(name, value)


@cache
def sources() -> str:
    """All Python code of the packages and of the tests."""
    folders = (ROOT / "ckpt", ROOT / "archon_lora", ROOT / "tests")
    paths = {path for folder in folders for path in folder.rglob("*.py")}
    paths -= {Path(__file__), ROOT / "tests/e2e/test_docs.py"}
    return "\n".join(path.read_text("utf-8") for path in sorted(paths))


def run_ckpt(words: list[str], stage: Stage, kind: str) -> tuple[int, str]:
    if words[1] in LISTEN:
        return start_ckpt(words, stage, kind)
    done = CliRunner().invoke(app, words[1:])
    return done.exit_code, done.output


def start_ckpt(words: list[str], stage: Stage, kind: str) -> tuple[int, str]:
    """Start a command that goes on, on a free port, to which the document is moved.

    Returns:
        Its status and output; of one that goes on, 0 and nothing.
    """
    named_at = words[words.index("--listen") + 1] if "--listen" in words else LISTEN[words[1]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    stage.places[named_at] = f"127.0.0.1:{port}"
    log, out = (stage.folder / f"{words[1]}-{port}.{name}" for name in ("log", "out"))
    process = start(ckpt_process, [*words, "--listen", f"127.0.0.1:{port}"], str(log), str(out))
    stage.running.callback(process.join, 30)
    stage.running.callback(process.terminate)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.is_alive():
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            if kind != "console":
                return 0, ""
            while out.stat().st_size == 0 and "--json" in words and time.monotonic() < deadline:
                time.sleep(0.01)  # it listens a moment before it says so
            process.terminate()
            process.join(30)
            return int(process.exitcode or 0), out.read_text()
    raise AssertionError(f"{words} does not listen: {log.read_text() if log.exists() else ''}")


def ckpt_process(words: list[str], log: str, out: str) -> None:
    """The ``ckpt`` command in a process of its own."""
    for stream, path in ((1, out), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    from ckpt.cli import main

    sys.argv = words
    main()


def run_training(words: list[str], stage: Stage, kind: str) -> tuple[int, str]:
    """``archon-lora``: in a transcript for good, else ``train`` only reads its settings."""
    if kind == "console":
        return run_process([sys.executable, "-m", "archon_lora.cli", *words[1:]], stage, both=True)
    shown = ["--print-config"] if words[1] == "train" else []
    done = CliRunner().invoke(training.app, [*words[1:], *shown])
    return done.exit_code, done.output + repr(done.exception or "")


def run_process(words: list[str], stage: Stage, *, both: bool = False) -> tuple[int, str]:
    ended = subprocess.run(
        words,
        cwd=stage.folder,
        stdout=subprocess.PIPE,
        # Where the training tells of its steps.
        stderr=subprocess.STDOUT if both else None,
        text=True,
        check=False,
        timeout=120,
    )
    return ended.returncode, ended.stdout


def run_interpreter(words: list[str], stage: Stage, _kind: str) -> tuple[int, str]:
    if words[1:3] == ["-m", "benchmarks"]:
        from benchmarks.__main__ import _arguments

        return only_parsed(_arguments, words[2:])
    return run_process([sys.executable, *words[1:]], stage)


def run_torchrun(words: list[str], stage: Stage, kind: str) -> tuple[int, str]:
    assert words[1] == "--nproc-per-node"
    assert words[2].isdigit()
    if words[3:5] == ["-m", "archon_lora.cli"]:
        return run_training(["archon-lora", *words[5:]], stage, kind)
    main = runpy.run_path(str(ROOT / words[3]), run_name="documented")["main"]
    return only_parsed(main, words[3:])


class Parsed(Exception):
    """The arguments were understood."""


def only_parsed(program: Callable[[], object], words: list[str]) -> tuple[int, str]:
    """Run a program until it has read its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        parse(self, words[1:])
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            program()
        except Parsed:
            return 0, ""
        except SystemExit as end:
            return int(end.code or 0), ""
    return 1, "it read no arguments"


def check_pip(words: list[str], _stage: Stage, _kind: str) -> tuple[int, str]:
    """The project, by its name or as this checkout, with extras that it has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [word for word in words[2:] if word != "-e"]
    match = re.fullmatch(r"([\w.-]+?)(?:\[([\w,]+)\])?", wanted[0]) if len(wanted) == 1 else None
    if words[1] != "install" or not match or match[1] not in (".", project["name"]):
        return 1, f"not understood: {words}"
    missing = set(filter(None, (match[2] or "").split(",")))
    missing -= project["optional-dependencies"].keys()
    return (1, f"no extra {missing}") if missing else (0, "")


def export(words: list[str], stage: Stage, _kind: str) -> tuple[int, str]:
    for word in words[1:]:
        found = ASSIGNED.fullmatch(word)
        if not found:
            return 1, f"{word} sets nothing"
        set_variable(found[1], found[2], stage, " ".join(words))
    return 0, ""


def curl(words: list[str], _stage: Stage, _kind: str) -> tuple[int, str]:
    """Ask until the answer is a good one."""
    assert words[1] == "-s"
    deadline = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(words[2], timeout=10) as answer:
                return 0, answer.read().decode()
        except OSError as error:
            if time.monotonic() > deadline:
                return 1, str(error)
            time.sleep(0.05)


def check_make(words: list[str], _stage: Stage, _kind: str) -> tuple[int, str]:
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    return int(words[1] not in targets), f"no target {words[1]}"


def matches(wanted: str, said: str, *, shaped: bool = False) -> bool:
    """Whether an output is the printed one, white space aside, ``...`` for anything."""
    parts = [" ".join(part.split()) for part in re.split(r"\.\.\.|…", wanted.strip())]
    if shaped:
        parts, said = [shape(part) for part in parts], shape(said)
    pattern = ".*".join(re.escape(part) for part in parts)
    return re.fullmatch(pattern, " ".join(said.split())) is not None or not wanted.strip()


def shape(text: str) -> str:
    """The words of a text that no run changes: without figures, units, rules and paths."""
    words = (word for word in text.split() if not re.search(r"[0-9/]", word))
    return " ".join(word for word in words if re.search(r"[A-Za-z]", word) and word not in UNITS)


UNITS = {"B", "kB", "MB", "GB", "ms", "s"}

COMMANDS: dict[str, Callable[[list[str], Stage, str], tuple[int, str]]] = {
    "ckpt": run_ckpt,
    "archon-lora": run_training,
    "python": run_interpreter,
    "torchrun": run_torchrun,
    "pip": check_pip,
    "export": export,
    "curl": curl,
    "make": check_make,
}

KINDS: dict[str, Callable[[Block, Stage, str], None]] = {
    "python": run_python,
    "excerpt": check_excerpt,
    "file": write_file,
    "console": run_commands,
    "sh": run_commands,
    "toml": load_toml,
    "json": keep_text,
    "yaml": load_yaml,
}
