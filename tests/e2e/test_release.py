"""What is released: a source archive from which the wheel can be built, and a wheel that works.

``make release`` installs the wheel into an empty environment and runs the README's example there;
the rest runs with all other tests.
"""

from __future__ import annotations

import email.message
import email.parser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("archon_lora", "ckpt")
SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md")
ASKED = "CKPT_TEST_RELEASE"

PERMISSIVE = re.compile(
    r"apache|bsd|mit\b|psf|python software foundation|isc|zlib|unlicense", re.IGNORECASE
)
WEAK = {"certifi", "tqdm"}
"""Under the Mozilla Public License, which binds changes to their own files alone."""

pytestmark = pytest.mark.e2e


def build(kind: str, source: Path, into: Path) -> Path:
    """What a build front end does once its environment is there."""
    into.mkdir(exist_ok=True)
    call = f"import setuptools.build_meta as b; print(b.build_{kind}({str(into)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=source, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return into / done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel that was made from the source archive, not from the checkout."""
    folder = tmp_path_factory.mktemp("release")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, checkout / name)
    archive = build("sdist", checkout, folder / "dist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    return build("wheel", source, folder / "dist")


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (one for one in packed.namelist() if one.endswith("dist-info/METADATA"))
        return email.parser.Parser().parsestr(packed.read(name).decode("utf-8"))


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(names: set[str]) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if ".dist-info/" not in name}
    assert found == wanted
    for package in PACKAGES:
        assert f"{package}/py.typed" in found


def test_the_wheel_says_what_it_is(names: set[str], metadata: email.message.Message) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert "# archon-lora" in str(metadata.get_payload())
    asked = {str(Requirement(one)) for one in metadata.get_all("Requires-Dist", [])}
    assert {str(Requirement(one)) for one in PROJECT["dependencies"]} <= asked


def test_the_change_log_has_an_entry_for_what_comes_next() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "## [Unreleased]" in text
    assert f'version = "{PROJECT["version"]}"' in (ROOT / "pyproject.toml").read_text("utf-8")


def needed(names: list[str]) -> Iterator[str]:
    """Distributions that these need in turn, as they are installed here."""
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        yield name
        for text in requires:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(requirement.name.lower().replace("_", "-"))


def licence(name: str) -> str:
    about = importlib.metadata.metadata(name)
    said = [str(about.get(field, "")) for field in ("License-Expression", "License")]
    said += [one for one in about.get_all("Classifier", []) if one.startswith("License ::")]
    return " ".join(said)[:4000]


def test_what_the_core_and_the_service_need_may_be_used_by_anybody() -> None:
    extras = PROJECT["optional-dependencies"]
    first = [*PROJECT["dependencies"], *extras["cli"], *extras["client"], *extras["service"]]
    roots = [Requirement(one).name for one in first if not one.startswith("archon-lora")]
    found = {name: licence(name) for name in needed(roots)}
    assert len(found) > 20, "the walk over what is needed found next to nothing"
    odd = {
        name: said[:200]
        for name, said in found.items()
        if not PERMISSIVE.search(said) and name not in WEAK
    }
    assert not odd, f"neither permissive nor known: {odd}"


@pytest.mark.slow
@pytest.mark.skipif(ASKED not in os.environ, reason="`make release` installs the wheel for itself")
def test_an_empty_environment_runs_the_example(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin/python"
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    assert torch is not None
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, torch.group()], check=True, timeout=1200)
    constraints = ["-c", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, str(wheel)], check=True, timeout=1200)
    text = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert example is not None
    (tmp_path / "example.py").write_text(example.group(1))
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    for first in (0, 10):
        done = subprocess.run(
            [str(python), "-W", "error::DeprecationWarning:ckpt", "example.py"],
            cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"went from step {first} to {first + 9}" in done.stdout
    bare = subprocess.run(
        [home / "bin/ckpt", "ls", "."], capture_output=True, text=True, check=False
    )
    assert bare.returncode == 2
    assert "pip install 'archon-lora[cli]'" in bare.stderr
    subprocess.run([*pip, *constraints, f"{wheel}[service]"], check=True, timeout=1200)
    listed = subprocess.run(
        [home / "bin/ckpt", "ls", "runs/first"], cwd=tmp_path, env=clean, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert listed.returncode == 0, listed.stderr
    assert "run-v00000004" in listed.stdout
    checked = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout
