"""What lies at a place that is no run's root, so that a command can say which one it wants."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from .dcp.stock import METADATA
from .errors import NoCheckpoint
from .layout import ADAPTERS, STEPS, WRITERS, parse_step_dir, parse_version_name
from .migrate.prime_rl import find_prime_rl
from .migrate.verl import find_verl
from .peft import CONFIG_NAME

_OWN: Final = (STEPS, ADAPTERS, WRITERS)
_MODEL: Final = "config.json"
_NAMED: Final = 5
"""Roots that a message names at the most."""


def refuse_other(directory: Path) -> None:
    """Refuse a directory that is no root, if what it is can be told.

    One that holds nothing known is let through: it may be the root of a run that has not saved yet.

    Raises:
        NoCheckpoint: it is part of a root, holds roots, or is somebody else's; says what to do.
        OSError: it may not be looked at.
    """
    if is_root(directory):
        return
    found = _part(directory) or _others(directory) or _roots_below(directory)
    if found is not None:
        raise NoCheckpoint(f"{directory} is no root of a run: {found}")


def is_root(directory: Path) -> bool:
    """Whether a run has saved or published there."""
    return any((directory / name).is_dir() for name in _OWN)


def _part(directory: Path) -> str | None:
    """Of a root, which is easily taken for it when names are completed by a shell."""
    for level in (directory, directory.parent):
        if level.name in {STEPS, ADAPTERS} and any(_is_saved(p) for p in level.iterdir()):
            return f"it lies in one; name {level.parent}"
    return None


def _is_saved(path: Path) -> bool:
    if path.parent.name == STEPS:
        return parse_step_dir(f"{STEPS}/{path.name}") is not None
    return parse_version_name(path.name) is not None


def _others(directory: Path) -> str | None:
    takes_over = f"`ckpt import {directory} ROOT` takes it over"
    if find_prime_rl(directory) is not None:
        return f"it is a checkpoint of prime-rl; {takes_over}"
    if (directory / METADATA).is_file():
        return f"it is a checkpoint of stock DCP; {takes_over}"
    try:
        verl = find_verl(directory)
    except NoCheckpoint as error:  # of verl, but not whole, or a run of several steps
        return str(error)
    if verl is not None:
        return f"it is a checkpoint of verl; {takes_over}"
    if (directory / CONFIG_NAME).is_file():
        return f"it is a PEFT adapter; `ckpt lint {directory}` looks at it, and {takes_over}"
    if (directory / _MODEL).is_file():
        return f"it is a model ({_MODEL}); name the directory that its training saves to"
    return None


def _roots_below(directory: Path) -> str | None:
    names = sorted(path.name for path in directory.iterdir() if is_root(path))
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    listed = ", ".join(names[:_NAMED])
    return f"there are some in it; name one of them: {listed}{more}" if names else None
