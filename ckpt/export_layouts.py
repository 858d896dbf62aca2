"""Where other consumers of adapters look for one, and under which names.

All of them read a plain PEFT directory. They differ in where it lies, in what they take for its
name, and in how they would confuse two of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from .errors import AlreadyExists, ConfigError
from .layout import TMP_PREFIX, check_name, new_attempt
from .lint.run import MOVING
from .peft import WrittenAdapter, local_directory
from .storage import open_storage

_NUMBER: Final = re.compile(r"[0-9]+$")
_DIGITS: Final = 8


class Layout(StrEnum):
    """Whose directories are written.

    ``ray``: Ray Serve LLM, ``<dynamic_lora_loading_path>/<lora_id>/``; ``lorax``: LoRAX, a prefix
    of a bucket; ``nim``: NVIDIA NIM, ``<NIM_PEFT_SOURCE>/<model>/``; ``peft``: the directory alone.
    """

    peft = "peft"
    ray = "ray"
    lorax = "lorax"
    nim = "nim"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter is to lie.

    Attributes:
        url: the directory that will hold the two files.
        staging: where they are written first; ``url`` itself, unless somebody watches its parent.
        use: what to tell the consumer, by the name of its setting.
    """

    url: str
    staging: str
    use: Mapping[str, str]


def default_name(root: str, step: int) -> str:
    """``<run>-step-00000120``, after the last part of the run's root.

    Raises:
        ConfigError: that part is no name that could be used.
    """
    last = str(local_directory(root) or root).rstrip("/").rpartition("/")[2]
    name = f"{last}-step-{step:0{_DIGITS}d}"
    try:
        return check_served_name(name)
    except ConfigError as error:
        raise ConfigError(f"no name can be made of {root}: {error}; set --name") from error


def check_served_name(name: str) -> str:
    """A name under which an adapter may be served, itself.

    Servers cache by name and many list by prefix: a name must stand for one adapter for ever, and
    none may be the beginning of another, which numbers of one width see to.

    Raises:
        ConfigError: it is no safe name, moves, or ends with a number that is not padded.
    """
    check_name("the adapter's name", name)
    if MOVING.fullmatch(name):
        msg = (
            f"{name!r} stands for another adapter tomorrow, and servers would go on with the one "
            "that they have cached; give each version a name of its own"
        )
        raise ConfigError(msg)
    number = _NUMBER.search(name)
    if number is not None and len(number[0]) < _DIGITS:
        msg = (
            f"{name!r} ends with a number of {len(number[0])} digits; pad it to {_DIGITS}, so that "
            "no name is the beginning of another"
        )
        raise ConfigError(msg)
    return name


def place(
    layout: Layout,
    out: str,
    name: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> Place:
    """Decide where an adapter goes, and check that its name works there.

    Args:
        layout: whose layout.
        out: the directory of adapters; for ``peft`` the adapter's own.
        name: the adapter's name; ``peft`` does not use it.
        storage_options: for the store of ``out``.

    Raises:
        ConfigError: the name or the URL does not work for this consumer.
        AlreadyExists: an adapter, or one that the consumer could confuse with it, is there.
        StorageError: the store failed.
    """
    local = local_directory(out)
    root = out.rstrip("/") if local is None else str(local)
    if layout is Layout.peft:
        return Place(out, out, {})
    check_served_name(name)
    url = f"{root}/{name}"
    if layout is Layout.ray:
        return Place(url, url, {"dynamic_lora_loading_path": root, "model": f"<base>:{name}"})
    if layout is Layout.lorax:
        _refuse_prefixes(root, name, storage_options)
        bucket_path = url.partition("://")[2] if local is None else url
        source = "s3" if local is None else "local"
        return Place(url, url, {"adapter_source": source, "adapter_id": bucket_path})
    if local is None:
        raise ConfigError(f"NIM_PEFT_SOURCE is a directory on the server's machine; got {out}")
    staging = local.parent / f"{TMP_PREFIX}{new_attempt()}"
    return Place(url, str(staging), {"NIM_PEFT_SOURCE": root, "model": name})


def _refuse_prefixes(root: str, name: str, options: Mapping[str, Any] | None) -> None:
    """LoRAX lists what begins with the adapter's path, without a slash behind it."""
    local = local_directory(root)
    if local is not None and not local.is_dir():
        return
    for entry in open_storage(root, options).list(""):
        other = entry.name
        if other != name and (other.startswith(name) or name.startswith(other)):
            msg = (
                f"{other!r} and {name!r} in {root} begin alike, and LoRAX would read the files of "
                "both; use names of one width, in a directory of their own"
            )
            raise AlreadyExists(msg)


def write_placed(where: Place, write: Callable[[str], WrittenAdapter]) -> WrittenAdapter:
    """Have an adapter written, so that whoever watches sees all of it or nothing.

    Args:
        where: from :func:`place`.
        write: writes the directory that it is given.

    Raises:
        AlreadyExists: something is at the place.
        StorageError: the store failed; what ``write`` raises passes through.
    """
    if where.staging == where.url:
        try:
            return write(where.url)
        except AlreadyExists as error:
            if not where.use:
                raise
            raise _taken(where.url) from error
    staging, target = Path(where.staging), Path(where.url)
    if target.exists():
        raise _taken(where.url)
    written = write(where.staging)
    storage = open_storage(staging.parent)
    try:
        storage.rename_dir(staging.name, f"{target.parent.name}/{target.name}")
    finally:
        storage.delete_tree(staging.name)  # nothing is there any more, unless the rename failed
    return written


def _taken(url: str) -> AlreadyExists:
    return AlreadyExists(
        f"{url} exists already, and what is served under a name is never replaced; give this "
        "adapter another one (--name)"
    )
