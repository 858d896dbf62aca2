"""A document's blocks, and the stage and scene that they are run on."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    info: tuple[str, ...]
    text: str
    line: int

    @property
    def first(self) -> str:
        """Its first line, by which lists name it."""
        return self.text.strip().partition("\n")[0]

    @property
    def kind(self) -> str:
        """``excerpt``, ``file``, ``console``, or the language."""
        if self.info[1:2] in (("of",), ("file",)):
            return {"of": "excerpt", "file": "file"}[self.info[1]]
        if self.text.startswith("$ "):
            return "console"
        return " ".join(self.info) or "sh"


def blocks_of(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    return [
        Block(tuple(match[1].split()), match[2], text.count("\n", 0, match.start()) + 1)
        for match in FENCE.finditer(text)
    ]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def nothing(_stage: Stage) -> None:
    """No preparation."""


@dataclass(frozen=True)
class Scene:
    """What a document's blocks find, beside what the document itself makes.

    Attributes:
        begin: before the first block.
        before: before the block with this first line.
        end: after the last block: what must have come of it.
    """

    begin: Callable[[Stage], None] = nothing
    before: dict[str, Callable[[Stage], None]] = field(default_factory=dict)
    end: Callable[[Stage], None] = nothing


@dataclass
class Stage:
    """Where a document's blocks run.

    Attributes:
        folder: the working directory.
        patch: sets what ends with the test.
        running: ends what was started.
        fixture: gives a fixture of pytest by name.
        names: what Python blocks know.
        places: what a document calls a place: where it is here.
        statuses: of commands that do not end with 0 and do not say so.
        shaped: outputs are compared without their figures, dates and hashes.
        enough: what a scene raises in a loop that would go on for ever.
        said: the output of each command that was run.
        read: parsed blocks of TOML, JSON and YAML, in their order.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    running: ExitStack
    fixture: Callable[[str], Any]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "example"})
    places: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    shaped: bool = False
    enough: type[Exception] | None = None
    said: dict[str, str] = field(default_factory=dict)
    read: list[Any] = field(default_factory=list)

    def own(self, text: str) -> str:
        """The text with its places replaced."""
        for place in sorted(self.places, key=len, reverse=True):
            text = text.replace(place, self.places[place])
        return text
