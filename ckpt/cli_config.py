"""Settings of the ``ckpt`` command from a TOML file and the environment.

Every option can be given in three places, and the first that has it counts: the command line, the
environment (``CKPT_<COMMAND>_<OPTION>``), the file. In the file each command has a table of its
options' names; what stands before the tables holds for every command that has such an option.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import typer
from typer.core import TyperOption

from .errors import ConfigError

DEFAULT_NAME: Final = "ckpt.toml"
ENVIRONMENT: Final = "CKPT_CONFIG"
PREFIX: Final = "CKPT"
"""Of the environment variables: ``CKPT_PRUNE_KEEP_LATEST`` is ``ckpt prune --keep-latest``."""

Commands = Mapping[str, Any]
"""The commands by name: click's, of which typer has had its own copy since 0.28."""

_PLACES: Final = {"ENVIRONMENT": "environment", "DEFAULT_MAP": "file"}
_NEVER: Final = frozenset({"help", "as_json"})
"""Options that belong to one call: a file that asked for JSON would break every script."""


def find_config(named: Path | None) -> Path | None:
    """The file that counts: the one named, or ``ckpt.toml`` in the working directory if there.

    Raises:
        ConfigError: the one that was named is not there.
    """
    if named is not None:
        if not named.is_file():
            msg = f"no such configuration file: {named} (--config or {ENVIRONMENT} names it)"
            raise ConfigError(msg)
        return named
    found = Path(DEFAULT_NAME)
    return found if found.is_file() else None


def read_config(path: Path, commands: Commands) -> dict[str, dict[str, Any]]:
    """A file as defaults of the commands' options.

    Args:
        path: a TOML file.
        commands: all of them.

    Returns:
        By command, the options' parameter names and values.

    Raises:
        ConfigError: not TOML, or a command or option that there is not; names the ones there are.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a TOML file that can be read: {error}") from error
    shared = {key: value for key, value in data.items() if not isinstance(value, Mapping)}
    tables = {key: value for key, value in data.items() if isinstance(value, Mapping)}
    known = {name: {key: opt.name for key, opt in options(c)} for name, c in commands.items()}
    for name in tables:
        if name not in known:
            msg = f"{path}: [{name}] is no command; there are {', '.join(sorted(known))}"
            raise ConfigError(msg)
    for key in shared:
        if not any(key in names for names in known.values()):
            every = sorted({one for names in known.values() for one in names})
            msg = f"{path}: {key!r} is an option of no command; there are {', '.join(every)}"
            raise ConfigError(msg)
    defaults: dict[str, dict[str, Any]] = {}
    for name, names in known.items():
        own = tables.get(name, {})
        for key in own:
            if key not in names:
                msg = (
                    f"{path}: [{name}] has no option {key!r}; there are {', '.join(sorted(names))}"
                )
                raise ConfigError(msg)
        chosen = {**{key: shared[key] for key in shared if key in names}, **own}
        defaults[name] = {str(names[key]): value for key, value in chosen.items()}
    return defaults


def options(command: Any) -> Iterator[tuple[str, TyperOption]]:
    """(name in the file, option) of everything a file may set: ``keep_latest`` of --keep-latest."""
    for parameter in command.params:
        if isinstance(parameter, TyperOption) and parameter.name not in _NEVER:
            longest = max(parameter.opts, key=len)
            yield longest.lstrip("-").replace("-", "_"), parameter


def name_variables(commands: Commands) -> None:
    """Give every option its variable: ``CKPT_EXPORT_FORMAT`` of ``ckpt export --format``.

    Left to itself click would take the name that the option's value has in our code.
    """
    for name, command in commands.items():
        for key, option in options(command):
            option.envvar = f"{PREFIX}_{name}_{key}".upper().replace("-", "_")


def config_text(context: typer.Context, commands: Commands) -> str:
    """What every option of every command is now, as a file that could be read back.

    Args:
        context: that of the group, with the defaults of the file in it.
        commands: all of them.

    Raises:
        ConfigError: a value that its option does not take; names both.
    """
    lines = []
    for name, command in sorted(commands.items()):
        rows = list(_rows(name, command, context))
        if rows:
            lines += [f"[{name}]", *rows, ""]
    return "\n".join(lines)


def _rows(name: str, command: Any, context: typer.Context) -> Iterator[str]:
    own = command.context_class(command, info_name=name, parent=context)
    for key, option in options(command):
        value, source = option.consume_value(own, {})
        place = _PLACES.get(source.name)
        try:
            value = None if value is None else option.process_value(own, value)
        except typer.BadParameter as error:
            msg = f"[{name}] {key}, from the {place or 'defaults'}: {error.format_message()}"
            raise ConfigError(msg) from error
        note = f"  # from the {place}" if place else ""
        empty = value is None or value == ()
        yield f"# {key} =" if empty else f"{key} = {_toml(value)}{note}"


def _toml(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # A JSON string is a TOML basic string, but for the one character that JSON leaves as it is.
    return json.dumps(os.fspath(value) if isinstance(value, Path) else str(value)).replace(
        "\x7f", "\\u007f"
    )
