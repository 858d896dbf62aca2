"""Where a run's settings come from beside its file, and what they are in the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from archon_lora.rl.config import TrainConfig
from ckpt.storage.redact import Redactor

PREFIX = "ARCHON_LORA__"
"""Of the environment variables: ``ARCHON_LORA__RUN__STEPS=10`` is ``--set run.steps=10``."""


def environment_overrides(environment: Mapping[str, str]) -> list[str]:
    """Overrides that the environment holds, for :func:`~archon_lora.rl.config.load_config`.

    They count for more than the file and for less than the command line; one that names no
    setting is refused like any other override.
    """
    return [
        f"{name.removeprefix(PREFIX).lower().replace('__', '.', 1)}={value}"
        for name, value in sorted(environment.items())
        if name.startswith(PREFIX)
    ]


def config_text(config: TrainConfig) -> str:
    """Every setting as a TOML file that gives the same run; those without a value as comments.

    Secrets among the storage options are blotted out, for this is printed.
    """
    lines = []
    redact = Redactor(config.checkpoint.storage_options)
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        values = getattr(config, section.name)
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            line = f"# {field.name} =" if value is None else f"{field.name} = {_toml(value)}"
            lines.append(redact(line) if field.name == "storage_options" else line)
        lines.append("")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = (f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items())
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    # A JSON string is a TOML basic string, but for the one character that JSON leaves as it is.
    return json.dumps(str(value)).replace("\x7f", "\\u007f")
