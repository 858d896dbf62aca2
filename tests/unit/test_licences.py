"""What the project brings along may be used by anybody, extra by extra, and the page says so."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support.environments import canonical, needed

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
GROUPS: dict[str, list[str]] = {"": PROJECT["dependencies"], **EXTRAS}

PERMITTED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause",
    "BSL-1.0", "CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib",
}  # fmt: skip
"""SPDX names of licences that ask for no more than that their text comes along."""
BY_NAME = {
    "certifi": "MPL-2.0",
    "hypothesis": "MPL-2.0",
    "pathspec": "MPL-2.0",
    "tqdm": "MPL-2.0",
}
"""The Mozilla Public License binds changes to the files under it, and nothing is changed here."""

WORDS = {
    "apache": "Apache-2.0", "apache 2.0": "Apache-2.0", "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0", "apache software license": "Apache-2.0",
    "bsd": "BSD-3-Clause", "bsd-3": "BSD-3-Clause", "bsd license": "BSD-3-Clause",
    "3-clause bsd license": "BSD-3-Clause", "bsd 3-clause license": "BSD-3-Clause",
    "bsd 2-clause license": "BSD-2-Clause", "mit license": "MIT", "isc license": "ISC",
    "isc license (iscl)": "ISC", "python software foundation license": "PSF-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
}  # fmt: skip
"""How packages without an SPDX expression say it: a plain "BSD" has two or three clauses."""


def said(about: importlib.metadata.PackageMetadata) -> str:
    """A package's licence as an SPDX expression; as it stands where nobody knows what it means."""
    if expression := about.get("License-Expression"):
        return str(expression)
    text = str(about.get("License") or "").strip()
    classifiers = [
        one.rpartition(" :: ")[2]
        for one in about.get_all("Classifier") or []
        if one.startswith("License ::")
    ]
    # A whole text in the field, or "Dual License", says less than the classifiers do.
    known = text if spdx(text) else " OR ".join(spdx(one) or "" for one in classifiers)
    return spdx(known) or known.strip(" OR") or text or "nothing"


def spdx(text: str) -> str | None:
    if all(term in {*PERMITTED, "MPL-2.0"} for term in re.split(r" AND | OR ", text)):
        return text
    return WORDS.get(text.lower())


def refused(name: str, expression: str) -> bool:
    """Whether a licence asks for more than that its text comes along."""
    allowed = {*PERMITTED, BY_NAME.get(name)}
    return not any(
        all(term in allowed for term in choice.split(" AND "))
        for choice in expression.replace("(", "").replace(")", "").split(" OR ")
    )


@pytest.mark.parametrize("group", GROUPS, ids=lambda name: name or "core")
def test_licences(group: str) -> None:
    missing: set[str] = set()
    found = {
        name: said(importlib.metadata.metadata(name))
        for name in needed(GROUPS[group], EXTRAS, missing)
    }
    assert {name: text for name, text in found.items() if refused(name, text)} == {}
    if missing:
        pytest.skip(f"not installed here, not looked at: {', '.join(sorted(missing))}")
    assert found


@pytest.mark.parametrize(
    ("name", "expression", "no"),
    [
        ("x", "MIT", False),
        ("x", "Apache-2.0 AND CNRI-Python", False),
        ("x", "GPL-3.0-only OR MIT", False),
        ("x", "GPL-3.0-only", True),
        ("x", "MIT AND LGPL-2.1-or-later", True),
        ("x", "MPL-2.0", True),
        ("certifi", "MPL-2.0", False),
        ("x", "a permit", True),
        ("x", "nothing", True),
    ],
)
def test_a_licence_can_be_refused(name: str, expression: str, *, no: bool) -> None:
    assert refused(name, expression) is no


# -- docs/dependencies.md ------------------------------------------------------------------------


def rows() -> dict[str, tuple[set[str], dict[str, str]]]:
    """The page's tables by extra: further extras it includes, and packages with their licences."""
    text = (ROOT / "docs" / "dependencies.md").read_text("utf-8")
    found: dict[str, tuple[set[str], dict[str, str]]] = {}
    lines = re.compile(r"^\| (.+?) \| .+? \| (.+?) \|$", re.MULTILINE)
    for extra, packages in lines.findall(text):
        if extra == "extra":
            continue
        group = "" if extra == "core" else extra.strip("`[]")
        includes = set(re.findall(r"`\[(\w+)\]`", packages))
        # "a, b (MIT), c (BSD-3-Clause)": a licence holds for every name before it.
        licences, waiting = {}, []
        for item in re.sub(r"`\[\w+\]`(?:, )?", "", packages).split(", "):
            match = re.fullmatch(r"([\w-]+)(?: \((.+)\))?", item)
            if match:
                waiting.append(match[1])
                if match[2]:
                    licences.update(dict.fromkeys(waiting, match[2]))
                    waiting = []
        found[group] = (includes, licences)
    return found


def test_the_page_has_every_extra_with_its_packages_and_their_licences() -> None:
    told = rows()
    assert told.keys() == GROUPS.keys()
    for group, texts in GROUPS.items():
        asked = [Requirement(text) for text in texts]
        own = {extra for one in asked if one.name == "archon-lora" for extra in one.extras}
        others = {canonical(one.name) for one in asked if one.name != "archon-lora"}
        includes, licences = told[group]
        assert includes == own, group
        assert set(licences) == others, group
        for name, text in licences.items():
            try:
                about = importlib.metadata.metadata(name)
            except importlib.metadata.PackageNotFoundError:
                continue  # reported by name above, as a skip
            assert text == said(about), name
