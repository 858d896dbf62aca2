"""Writes docs/api.md: the public names of each package with signature and docstring.

``python docs/make_api.py`` writes it; with ``--check`` it only says whether the page is up to date,
by status 0 or 1.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGES = (
    "archon_lora",
    "archon_lora.engine",
    "ckpt",
    "ckpt.handoff",
    "ckpt.client",
    "ckpt.dcp",
    "ckpt.storage",
)
SINGLE = {
    "archon_lora.engine.areal": ("ArchonLoRA", "HandOver"),
    "archon_lora.models.parallel_dims": ("ParallelDims",),
    "archon_lora.stages": ("mark_stages",),
    "ckpt.consolidate": ("consolidate",),
    "ckpt.dcp.exporting": ("export_checkpoint",),
    "ckpt.dcp.importing": ("import_checkpoint",),
    "ckpt.lint": ("BaseModel", "lint_adapter"),
    "ckpt.storage.s3_reap": ("reap_uploads",),
    "ckpt.versions": ("list_versions", "read_version"),
}
"""Names that the other pages use of modules whose further names are not for users."""
TARGET = Path(__file__).with_name("api.md")
INTRO = """# API

The public names of {packages},
and [others that are used singly](#single-names), from their docstrings.
`python docs/make_api.py` writes this page; a test sees to it that it is up to date. What each error
means, and what to do, stands in [the failure model](failure-model.md#errors).
"""
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_SET = re.compile(r"frozenset\(\{(.*?)\}\)")
_ENUM = re.compile(r"<(\w+\.\w+): [^>]*>")
_QUOTED = re.compile(r"""(: |-> )(["'])(.*?)\2(?=[,) =]|$)""")


def page() -> str:
    """The whole page."""
    packages = ", ".join(f"[`{name}`](#{name.replace('.', '')})" for name in PACKAGES)
    parts = [INTRO.format(packages=packages)]
    for name in PACKAGES:
        parts += section(importlib.import_module(name))
    parts.append("## Single names\n")
    for name, members_of in SINGLE.items():
        home = importlib.import_module(name)
        for member in members_of:
            parts += entry(f"{name}.{member}", getattr(home, member))
    return "\n".join(parts)


def section(package: ModuleType) -> Iterator[str]:
    """A package: its docstring, then each public name."""
    yield f"## {package.__name__}\n"
    yield block(docstring(package))
    for name in sorted(package.__all__):
        yield from entry(name, getattr(package, name))


def entry(name: str, value: Any) -> Iterator[str]:
    """A public name: signature and docstring, and those of a class's methods."""
    yield f"### {name}\n"
    if inspect.isclass(value) and issubclass(value, BaseException):
        parents = ", ".join(f"`{base.__name__}`" for base in value.__bases__)
        yield f"{docstring(value).splitlines()[0]} A kind of {parents}.\n"
        return
    if not callable(value) or not hasattr(value, "__module__"):
        yield f"```text\n{name} = {shown(value)}\n```\n"
        return
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        yield f"```text\n{name} = {value}\n```\n"  # an alias of types has no docstring of its own
        return
    yield block(f"{name}{signature(value)}\n\n{indented(docstring(value))}")
    if inspect.isclass(value):
        for member, found in members(value):
            yield block(f"{name}.{member}{signature(found)}\n\n{indented(docstring(found))}")


def members(kind: type) -> Iterator[tuple[str, Callable[..., Any] | property]]:
    """The public methods and properties that a class of ours defines or inherits from ours."""
    for name in sorted(dir(kind)):
        owner = next((base for base in kind.__mro__ if name in vars(base)), object)
        if name.startswith("_") or owner.__module__.split(".")[0] not in {"ckpt", "archon_lora"}:
            continue
        found = inspect.getattr_static(kind, name)
        if isinstance(found, classmethod | staticmethod):
            found = found.__func__
        if inspect.isfunction(found) or isinstance(found, property):
            yield name, found


def docstring(value: object) -> str:
    """The docstring, cleaned; a dataclass's generated one counts as none.

    Raises:
        LookupError: there is none; names what lacks it.
    """
    text = inspect.getdoc(value) or ""
    name = getattr(value, "__name__", "") or getattr(getattr(value, "fget", None), "__name__", "")
    if not text or text.startswith(f"{name}("):
        raise LookupError(f"{getattr(value, '__module__', '')} {name or value!r} has no docstring")
    return text


def signature(value: Any) -> str:
    """The parameters as they are written, without addresses; empty for a property or protocol."""
    if isinstance(value, property) or getattr(value, "_is_protocol", False):
        return ""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return "(…)"
    own = [p for p in found.parameters.values() if p.name != "self"]
    text = _ADDRESS.sub("", str(found.replace(parameters=own))).replace("<factory>", "…")
    text = _ENUM.sub(r"\1", _SET.sub(lambda match: _in_order(match[1]), text))
    return _QUOTED.sub(r"\1\3", text)  # annotations are texts there


def shown(value: object) -> str:
    """A constant, the same in every process."""
    return _ENUM.sub(r"\1", _SET.sub(lambda match: _in_order(match[1]), repr(value)))


def _in_order(members: str) -> str:
    """A set is shown in another order in every process."""
    return f"frozenset({{{', '.join(sorted(members.split(', ')))}}})"


def indented(text: str) -> str:
    """The text four columns further in."""
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())


def block(text: str) -> str:
    """A fenced block, which shows a docstring as it stands in the code."""
    return f"```text\n{text}\n```\n"


def main() -> int:
    """Write or check the page; the exit status."""
    text = page()
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text("utf-8") != text)
    TARGET.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
