"""The archives that are released, built once for all tests that look at them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JUNK = (
    ".env", "docker/.env", "docker/tokens", "docker/store.env", "tests/id_rsa", "docs/notes.txt",
    "benchmarks/.peers/torchtune/models.py", "benchmarks/run.log", "demo-out/report.json",
    "runs/first/LATEST", "ckpt/__pycache__/x.cpython-311.pyc", "tests/__pycache__/y.pyc",
    ".venv/pyvenv.cfg", ".hypothesis/unicode.json", ".coverage", ".mypy_cache/3.11/a.json",
    "examples/out.safetensors", "build/lib/ckpt/old.py", "dist/archon_lora-0.0.1.tar.gz",
)  # fmt: skip
"""What lies around in a checkout that was worked in: keys, caches, results, somebody's notes."""


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


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Every file of the repository; asks git where there is one, else all of an archive's."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        ).stdout.split("\0")  # fmt: skip
        return sorted({name for name in listed if name and (ROOT / name).is_file()})
    made = {"PKG-INFO", "setup.cfg"}
    return sorted(
        name
        for path in ROOT.rglob("*")
        if path.is_file()
        and not {"__pycache__", ".venv", "archon_lora.egg-info"} & set(path.parts)
        and not any(part.endswith("_cache") for part in path.parts)
        and (name := path.relative_to(ROOT).as_posix()) not in made
    )


@pytest.fixture(scope="session")
def sdist(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive of a checkout that has been worked in."""
    folder = tmp_path_factory.mktemp("release")
    checkout = folder / "checkout"
    for name in sources:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    for name in JUNK:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("AWS_SECRET_ACCESS_KEY=not-for-others\n")
    return build("sdist", checkout, folder / "dist")


@pytest.fixture(scope="session")
def wheel(sdist: Path) -> Path:
    """A wheel that was made from the source archive, not from the checkout."""
    unpacked = sdist.parent.parent / "unpacked"
    with tarfile.open(sdist) as packed:
        packed.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return build("wheel", source, sdist.parent)
