"""What the commands of ``ckpt`` share: their options, errors and output.

Exit status: 0 fine; 1 something was found (damage, a value that is not finite, state that does not
fit); 2 the request cannot be met (wrong option, no such step, the output exists); 3 the store.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from .errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    ObjectNotFound,
    StorageError,
)
from .peft import local_directory
from .storage import Storage, open_storage

FOUND: Final = 1
USAGE: Final = 2
STORAGE: Final = 3
_WIDTH: Final = 400


class Dtype(StrEnum):
    """What exported and imported adapter tensors are cast to."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


Url = Annotated[
    str, typer.Argument(help="The run's root: a directory, or a URL such as s3://bucket/run7.")
]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Step number.")]
Epoch = Annotated[
    int | None, typer.Option("--epoch", min=1, help="Writer of the step; for abandoned steps.")
]
Version = Annotated[str | None, typer.Option("--version", help="Name of a published version.")]
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint-url", help="S3 endpoint; by default what AWS_ENDPOINT_URL says."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def refuse_both(step: int | None, version: str | None) -> None:
    """Refuse a step and a version at once."""
    if step is not None and version is not None:
        raise ConfigError("--step and --version exclude each other: name one of them")


def store_options(url: str, endpoint_url: str | None) -> dict[str, Any] | None:
    """The storage options that go with a URL."""
    if endpoint_url is None or local_directory(url) is not None:
        return None
    return {"endpoint_url": endpoint_url}


def open_root(url: str, endpoint_url: str | None) -> Storage:
    """The store of a root that must be there."""
    local = local_directory(url)
    if local is not None and not local.is_dir():
        raise ObjectNotFound(f"no such directory: {local}")
    return open_storage(url, store_options(url, endpoint_url))


@contextlib.contextmanager
def reported(as_json: bool, *, verifiable: bool = True) -> Iterator[None]:
    """Turn errors of the package into one line, a remedy and an exit status.

    Args:
        as_json: print the error as a document as well.
        verifiable: what may be damaged is ours, so that ``ckpt verify`` can say more.
    """
    try:
        yield
    except CkptError as error:
        status, hint = _status(error, verifiable)
        message = " ".join(str(error).split())
        if as_json:
            write_json({"error": {"type": type(error).__name__, "message": message}})
        complain(f"{message}{hint}")
        raise typer.Exit(status) from None


def _status(error: CkptError, verifiable: bool) -> tuple[int, str]:
    if isinstance(error, AlreadyExists | ConfigError | NoCheckpoint):
        return USAGE, ""
    if isinstance(error, StorageError):
        return STORAGE, "; check the URL, the AWS_* variables and --endpoint-url"
    more = verifiable and isinstance(error, DamagedError)
    return FOUND, "; `ckpt verify` tells what else is damaged" * more


def complain(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"ckpt: {message}\n")


def write_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def output_console() -> Console:
    """Where tables go."""
    console = Console(highlight=False)
    # Rich cuts what a line has no room for, but a name must be whole to be copied, so a long line
    # is left to the terminal to wrap. The longest name of a version has 100 characters.
    return Console(highlight=False, width=max(console.width, _WIDTH))


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal's standard error; elsewhere nothing."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
