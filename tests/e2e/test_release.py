"""What is released: a source archive that is the repository, and the wheel that it builds.

What the wheel does once installed: test_installed.py.
"""

from __future__ import annotations

import configparser
import email.message
import email.parser
import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PACKAGES = ("archon_lora", "ckpt")

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def document(wheel: Path, name: str) -> str:
    """A file of the wheel's ``.dist-info``."""
    with zipfile.ZipFile(wheel) as packed:
        (path,) = (one for one in packed.namelist() if one.endswith(f".dist-info/{name}"))
        return packed.read(path).decode("utf-8")


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    return email.parser.Parser().parsestr(document(wheel, "METADATA"))


def test_the_source_archive_is_the_repository_and_nothing_else(
    sdist: Path, sources: list[str]
) -> None:
    """It was made in a checkout full of keys, caches and results (conftest.py: JUNK)."""
    with tarfile.open(sdist) as packed:
        members = [member for member in packed if member.isfile()]
    found = {member.name.partition("/")[2] for member in members}
    made = {name for name in found if name.startswith("archon_lora.egg-info/")}
    assert found - made - {"PKG-INFO", "setup.cfg"} == set(sources)
    assert {name.rpartition("/")[2] for name in made} <= {
        *("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt"),
        *("requires.txt", "top_level.txt"),
    }
    assert {"LICENSE", "CHANGELOG.md", "tests/conftest.py", "docs/format.md"} <= found
    assert sdist.stat().st_size < 8_000_000


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(names: set[str]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in names if ".dist-info/" not in name}
    assert found == wanted
    for package in PACKAGES:
        assert f"{package}/py.typed" in found


def test_the_wheel_says_what_it_is(
    wheel: Path, names: set[str], metadata: email.message.Message
) -> None:
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert document(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text("utf-8")
    assert "# archon-lora" in str(metadata.get_payload())
    asked = {str(Requirement(one)) for one in metadata.get_all("Requires-Dist", [])}
    assert {str(Requirement(one)) for one in PROJECT["dependencies"]} <= asked
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert "py3-none-any" in wheel.name
    points = configparser.ConfigParser()
    points.read_string(document(wheel, "entry_points.txt"))
    assert dict(points["console_scripts"]) == PROJECT["scripts"]
    for target in [*PROJECT["scripts"].values(), points["vllm.general_plugins"]["ckpt"]]:
        assert target.partition(":")[0].replace(".", "/") + ".py" in names


def test_classifiers_name_what_is_tested(metadata: email.message.Message) -> None:
    classifiers = metadata.get_all("Classifier", [])
    assert "Typing :: Typed" in classifiers
    assert not any(one.startswith("License ::") for one in classifiers)  # License-Expression does
    pythons = [one for one in classifiers if "Python :: 3." in one]
    oldest = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])
    assert oldest is not None
    assert pythons == [f"Programming Language :: Python :: {oldest[1]}"]


def entries(text: str) -> list[str]:
    """The second-level headings of a change log, which must be in order."""
    found = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert found[0] == "[Unreleased]", "what comes next has no entry"
    numbers = []
    for heading in found[1:]:
        match = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d{2}-\d{2}", heading)
        assert match is not None, f"{heading!r} is not [X.Y.Z] - YYYY-MM-DD"
        numbers.append(Version(match[1]))
    assert numbers == sorted(set(numbers), reverse=True), "the newest version comes first"
    return [str(number) for number in numbers]


def check_version(text: str, version: str) -> None:
    """The version is the newest that the change log has, or one that it will have next."""
    released = entries(text)
    if version not in released[:1]:
        assert not released or Version(version) > Version(released[0]), "an old version"
        pending = text.partition("## [Unreleased]\n")[2].partition("\n## ")[0]
        assert pending.strip(), "a version of which the change log says nothing"


def test_the_change_log_and_the_version_agree() -> None:
    check_version((ROOT / "CHANGELOG.md").read_text("utf-8"), PROJECT["version"])


@pytest.mark.parametrize(
    ("log", "version"),
    [
        ("## [0.1.0] - 2026-01-02\n", "0.1.0"),
        ("## [Unreleased]\n\n", "0.1.0"),
        ("## [Unreleased]\n\n## [0.2.0] - 2026-01-02\n- x\n", "0.1.0"),
        ("## [Unreleased]\n\n## [0.2.0]\n- x\n", "0.2.0"),
        ("## [Unreleased]\n## [0.1.0] - 2026-01-02\n## [0.2.0] - 2026-01-03\n", "0.2.0"),
    ],
)
def test_a_change_log_can_disagree(log: str, version: str) -> None:
    with pytest.raises(AssertionError):
        check_version(log, version)


def test_the_version_is_written_down_once() -> None:
    version = re.escape(PROJECT["version"])
    code = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    twice = [
        path.relative_to(ROOT).as_posix()
        for path in code
        if re.search(rf"version.*[\"']{version}[\"']", path.read_text("utf-8"), re.IGNORECASE)
    ]
    assert twice == []
