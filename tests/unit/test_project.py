"""Rules about the project itself that no linter of ours checks."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PACKAGES = ("archon_lora", "ckpt")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]

# Reading through any of these can run code that the file chooses.
PICKLE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
PICKLE_CALLS = {"load", "loads", "Unpickler"}
# The exceptions: what `ckpt import` takes over, by unpicklers that resolve no name themselves.
FOREIGN = ("ckpt/dcp/stock_pickle.py", "ckpt/migrate/torch_pickle.py")


def relative(path: Path) -> str:
    """Path as messages show it."""
    return str(path.relative_to(ROOT))


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of every absolute import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def unsafe_reads(tree: ast.AST) -> list[str]:
    """Pickle-reading imports and calls in a module, one description each."""
    found = [f"import {name}" for name in imported(tree) if name in PICKLE_MODULES - {"pickle"}]
    for node in ast.walk(tree):
        # Naming pickle's error is fine (torch.load raises it); naming what reads is not.
        if isinstance(node, ast.ImportFrom) and node.module == "pickle":
            found += [f"import {a.name}" for a in node.names if a.name in PICKLE_CALLS | {"*"}]
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            found += [f"line {node.lineno}: pickle.{node.attr}"] * (node.attr in PICKLE_CALLS)
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        call = ast.unparse(node.func)
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if call == "torch.load" and said.get("weights_only") != "True":
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
        if said.get("allow_pickle", "False") != "False":
            found.append(f"line {node.lineno}: {call} with allow_pickle")
    return found


def core_modules() -> list[Path]:
    """The LoRA core: everything in archon_lora but models, engine, rl and cli."""
    outer = {"models", "engine", "rl", "cli.py", "cli_commands.py"}
    root = ROOT / "archon_lora"
    return [p for p in sorted(root.rglob("*.py")) if p.relative_to(root).parts[0] not in outer]


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_is_small_and_a_noun(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{relative(path)} has {lines} lines; split it"
    assert not re.search(r"util|helper|misc|common", path.stem), (
        f"name {relative(path)} by its noun"
    )


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_reads_no_pickle(path: Path) -> None:
    found = unsafe_reads(ast.parse(path.read_text(encoding="utf-8")))
    if relative(path) in FOREIGN:
        (base,) = found
        assert base.endswith("pickle.Unpickler")
    else:
        assert found == []


@pytest.mark.parametrize("name", FOREIGN)
def test_an_unpickler_resolves_no_name_itself(name: str) -> None:
    tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
    (reader,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases)
    ]
    methods = {node.name for node in reader.body if isinstance(node, ast.FunctionDef)}
    assert {"find_class", "persistent_load"} <= methods
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    resolving = ("find_class", "import_module", "__import__", "get_extension", "eval", "exec")
    assert [call for call in called if call.rpartition(".")[2] in resolving] == []
    assert set(imported(tree)) <= {
        *("__future__", "ckpt", "collections", "dataclasses", "io", "pickle", "pickletools"),
        *("torch", "typing"),
    }


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.loads(data)",
        "class Reader(pickle.Unpickler): ...",
        "from pickle import Unpickler",
        "def f():\n    from dill import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_read_is_found(code: str) -> None:
    assert len(unsafe_reads(ast.parse(code))) == 1


def test_safe_reads_are_left_alone() -> None:
    code = """
import pickle
try:
    torch.load(p, weights_only=True), numpy.load(p, allow_pickle=False), json.load(p)
except pickle.UnpicklingError:
    raise
"""
    assert unsafe_reads(ast.parse(code)) == []


@pytest.mark.parametrize("path", core_modules(), ids=relative)
def test_core_imports_torch_alone(path: Path) -> None:
    allowed = sys.stdlib_module_names | {"torch", "archon_lora"}
    names = set(imported(ast.parse(path.read_text(encoding="utf-8"))))
    assert names <= allowed, f"{relative(path)} imports {sorted(names - allowed)}"


def test_metadata() -> None:
    project = PROJECT["project"]
    assert project["name"] == "archon-lora"
    assert project["requires-python"] == ">=3.11"
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").lstrip().startswith("Apache License")
    assert set(EXTRAS) >= {"cli", "peft", "rl", "demo", "test", "lint"}
    core = {Requirement(text).name for text in project["dependencies"]}
    assert core == {"torch", "safetensors", "fsspec", "s3fs"}


@pytest.mark.parametrize("package", PACKAGES)
def test_package_ships_its_types(package: str) -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"][package]
    assert (ROOT / package / "py.typed").is_file()
    assert f"{package}*" in setuptools["packages"]["find"]["include"]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_is_a_package(package: str) -> None:
    # Without __init__.py the wheel would lack the folder, though the checkout works.
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert [relative(f) for f in sorted(folders) if not (f / "__init__.py").is_file()] == []


def test_constraints_pin_every_direct_dependency() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    bad = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)]
    assert bad == [], "only name==version, no URL, no local part, nothing editable"
    pins = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, _, version in (line.partition("==") for line in lines)
    }
    wanted = [*PROJECT["project"]["dependencies"], *(text for e in EXTRAS.values() for text in e)]
    for need in map(Requirement, wanted):
        if need.name != "archon-lora":
            assert need.name in pins, f"{need.name} has no line in constraints.txt"
            assert need.specifier.contains(pins[need.name], prereleases=True), str(need)


GUIDES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("docker/*.md")])


def headings(guide: Path) -> set[str]:
    """Of a guide, as links name them: lower case, dashes for spaces, no other signs."""
    text = re.sub(r"```.*?```", "", guide.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("path", GUIDES, ids=relative)
def test_links_between_guides_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        if "://" in link:
            continue
        if not target.exists() or (heading and heading not in headings(target)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize(
    "target",
    [
        "setup",
        "demo",
        "test",
        "test-fast",
        "test-s3",
        "faults",
        "bench",
        "bench-full",
        "lint",
        "fmt",
        "constraints",
    ],
)
def test_target_sets_up_the_environment_with_torch_first(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    plan = subprocess.run(
        ["make", "--no-print-directory", "-n", target],
        cwd=tmp_path,
        env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    steps = ["-m venv .venv", "'torch==", "-e '.[test,lint]'", "touch .venv/.stamp"]
    places = [plan.index(step) for step in steps]
    assert places == sorted(places)


@pytest.mark.parametrize(("status", "line"), [(0, "3 passed in 0.1s"), (1, "1 failed in 0.1s")])
def test_ci_run_reports_what_make_test_did(status: int, line: str, tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci" / "run")
    (tmp_path / "Makefile").write_text(f"test:\n\t@cat\n\t@echo '{line}'\n\t@exit {status}\n")
    done = subprocess.run(
        ["bash", ".ci/run"],
        cwd=tmp_path,
        env={**os.environ, "CI": "true", "MAKEFLAGS": "", "MAKELEVEL": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode == 0) == (status == 0)
    assert done.stdout.splitlines()[-1] == line


@pytest.mark.parametrize(
    ("path", "line", "contract"),
    [
        ("ckpt/types.py", "import archon_lora", "ckpt knows nothing of archon_lora BROKEN"),
        ("archon_lora/errors.py", "import ckpt", "know ckpt BROKEN"),
        ("archon_lora/errors.py", "import safetensors", "torch and nothing else BROKEN"),
        ("archon_lora/errors.py", "from . import models", "models, core BROKEN"),
        ("ckpt/errors.py", "from . import storage", "storage, format BROKEN"),
        ("ckpt/unplaced.py", "", "storage, format BROKEN"),
    ],
)
def test_import_contract_can_fail(path: str, line: str, contract: str, tmp_path: Path) -> None:
    pytest.importorskip("importlinter", reason="pip install '.[lint]'")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    with (tmp_path / path).open("a", encoding="utf-8") as module:
        module.write(f"{line}\n")
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert contract in done.stdout.replace("\n", " ")


# Imported, though nothing here asks for them by name: fastapi is made of two, and the others are
# used only where the caller has them.
UNASKED = {"areal", "numpy", "pydantic", "starlette", "vllm"}


def test_every_package_that_is_imported_is_asked_for() -> None:
    wanted = [*PROJECT["project"]["dependencies"], *(text for e in EXTRAS.values() for text in e)]
    asked = {Requirement(text).name.lower().replace("-", "_") for text in wanted}
    own = {*sys.stdlib_module_names, *PACKAGES}
    found = {name for path in MODULES for name in imported(ast.parse(path.read_text("utf-8")))}
    assert found - own - asked == UNASKED
