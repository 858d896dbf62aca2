"""What the documents name exists: options, variables, functions, errors, files, settings."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import typer.main

from archon_lora.cli_commands import app as training
from ckpt import SaveMetrics
from ckpt.cli_commands import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "docker/README.md")),
    *sorted(path for path in DOCS.glob("*.md") if path.name != "api.md"),
    *sorted(DOCS.glob("howto/*.md")),
]
COMMANDS = typer.main.get_command(app).commands
FOREIGN = {
    *("--rm", "--no-build", "--follow", "--build-arg", "--gpus", "--volumes"),  # of containers
    *("--enable-mixed-moe-lora-format", "--api-server-count"),  # of vLLM
}
"""Options of other programs that no file here uses."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def sources() -> str:
    """All code, settings and scripts of the repository, this file aside."""
    folders = ("ckpt", "archon_lora", "tests", "docker", "benchmarks")
    kinds = {".py", ".sh", ".yaml", ".toml"}
    found = [path for name in folders for path in (ROOT / name).rglob("*") if path.suffix in kinds]
    found += [ROOT / "Makefile", ROOT / "pyproject.toml"]
    return "\n".join(p.read_text("utf-8") for p in found if p != Path(__file__))


def options() -> set[str]:
    found = set()
    for tool in (app, training):
        group = typer.main.get_command(tool)
        for command in (group, *group.commands.values()):
            found |= {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return found


def resolves(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_what_a_page_names_exists(path: Path, sources: str) -> None:
    text = path.read_text("utf-8")
    missing = {n for n in re.findall(r"\b(?:CKPT|ARCHON)_[A-Z0-9_]+", text) if n not in sources}
    known = options() | FOREIGN
    for name in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text):
        if name not in known and name not in sources:
            missing.add(name)
    for name in re.findall(r"`((?:ckpt|archon_lora)(?:\.[A-Za-z_]+)+)[`(]", text):
        # Documents' formats have names of this form as well.
        if f'"{name}"' not in sources and name != "ckpt.toml" and not resolves(name):
            missing.add(name)
    for name in re.findall(r"`((?:tests|ckpt|archon_lora|docker|docs|examples)/[\w./-]*)`", text):
        if not (ROOT / name).exists():
            missing.add(name)
    for name in re.findall(r"`(?:[a-z_]+\.)*([a-z_]+)\(", text):
        if not re.search(rf"\b{name}\b", sources):
            missing.add(f"{name}()")
    assert missing == set()


@pytest.mark.parametrize(
    ("page", "command", "elsewhere"),
    [
        ("service.md", "serve", set()),
        ("portable-adapters.md", "lint", {"--endpoint-url", "--json"}),
    ],
)
def test_a_table_of_options_has_all_of_the_command(
    page: str, command: str, elsewhere: set[str]
) -> None:
    """That of `ckpt sync` is held by tests/unit/ckpt/test_cli_sync.py."""
    text = (DOCS / page).read_text("utf-8")
    rows = re.findall(r"^\| (`--(?:[^|]|\\\|)*) \|", text, re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"--[a-z][a-z-]*", row)}
    real = {name for p in COMMANDS[command].params for name in (*p.opts, *p.secondary_opts)}
    long = {name for name in real if name.startswith("--")}
    assert told - long - {"--layout"} == set(), "no such option"
    assert long - told - elsewhere - {"--values"} == set(), "not on the page"


def test_every_number_of_a_save_is_told() -> None:
    text = (DOCS / "metrics.md").read_text("utf-8")
    told = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert told == {field.name for field in dataclasses.fields(SaveMetrics)}


@pytest.mark.parametrize(("page", "command"), [("sync.md", "sync"), ("service.md", "serve")])
def test_defaults_are_the_commands(page: str, command: str) -> None:
    """Where a default is told as a value, not in words."""
    text = (DOCS / page).read_text("utf-8")
    params = {name: param for param in COMMANDS[command].params for name in param.opts}
    told = re.findall(r"^\| `(--[a-z-]+)[^|]*\| `?([0-9][\w.:]*)`? \|", text, re.MULTILINE)
    assert len(told) >= 4
    real = {name: params[name].default for name, _ in told}
    shown = {n: f"{v:g}" if isinstance(v, float) else str(v) for n, v in real.items()}
    assert dict(told) == shown


def test_every_command_is_told() -> None:
    text = "".join(path.read_text("utf-8") for path in PAGES)
    assert [name for name in COMMANDS if not re.search(rf"`ckpt {name}[ `]", text)] == []
    commands = typer.main.get_command(training).commands
    assert [name for name in commands if f"archon-lora {name} " not in text] == []
