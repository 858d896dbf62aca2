"""Environments that hold the built wheel and what its metadata asks for, and nothing else.

What ``pip install`` would bring is already installed here, so it is linked instead of downloaded:
an environment takes a fraction of a second, and whatever the wheel forgot to ask for is missing.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = "archon-lora"


def canonical(name: str) -> str:
    """A distribution's name in the one form in which names are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _asked(requirement: Requirement, own: Mapping[str, list[str]]) -> list[str]:
    """What a distribution, with the extras that are wanted of it, asks for by itself."""
    if canonical(requirement.name) == PROJECT:
        return [text for extra in requirement.extras for text in own[extra]]
    texts = importlib.metadata.requires(requirement.name) or []
    wanted = ["", *requirement.extras]
    found = []
    for text in texts:
        marker = Requirement(text).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted):
            found.append(text)
    return found


def needed(
    texts: Iterable[str], own: Mapping[str, list[str]], missing: set[str] | None = None
) -> Iterator[str]:
    """Distributions that requirements bring with them, as they are installed here.

    Args:
        texts: requirements.
        own: this project's extras, which requirements may name as ``archon-lora[x]``.
        missing: takes the names of those that are not installed here.
    """
    seen: set[str] = set()
    todo = list(texts)
    while todo:
        requirement = Requirement(todo.pop())
        mark = f"{canonical(requirement.name)}{sorted(requirement.extras)}"
        if mark in seen:
            continue
        seen.add(mark)
        try:
            todo += _asked(requirement, own)
        except importlib.metadata.PackageNotFoundError:
            if missing is not None:
                missing.add(canonical(requirement.name))
            continue
        if canonical(requirement.name) != PROJECT:
            yield canonical(requirement.name)


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        home: its folder.
        site: where its packages lie.
    """

    home: Path
    site: Path

    @property
    def python(self) -> str:
        return str(self.home / "bin" / "python")

    def run(
        self, *arguments: str, cwd: Path, timeout: float = 120, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """Run its interpreter; ``more`` goes into the environment variables."""
        clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
        return subprocess.run(
            [self.python, *arguments], cwd=cwd, env={**clean, **more}, capture_output=True,
            text=True, timeout=timeout, check=False,
        )  # fmt: skip


def linked_environment(home: Path, wheel: Path, distributions: Iterable[str]) -> Environment:
    """An environment with the wheel, unpacked, and links to distributions installed here."""
    venv.create(home, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    for name in distributions:
        distribution = importlib.metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or ()}
        for top in sorted(tops - {"..", "__pycache__"}):
            link = site / top
            if not link.exists():  # several may share a namespace
                link.symlink_to(os.fspath(distribution.locate_file(top)))
    return Environment(home, site)
