"""What the commands of ``ckpt`` share: their options, errors and output.

Exit status: 0 fine; 1 something was found (damage, a value that is not finite, state that does not
fit); 2 the request cannot be met (wrong option, no such step, the output exists); 3 the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import typer
from rich.console import Console

from .cli_found import refuse_other
from .errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    DamagedError,
    HandoffTimeout,
    NoCheckpoint,
    NonFiniteError,
    ObjectNotFound,
    PublishError,
    ReadOnly,
    StepExists,
    StorageError,
    StoreNotExclusive,
)
from .layout import WRITERS
from .peft import local_directory
from .storage import Storage, open_storage
from .storage.redact import public_url

EXIT_STATUS: Final = (
    "Exit status: 0 fine; 1 something was found; 2 the request cannot be met (a wrong option, no "
    "such step, an output that exists); 3 the store failed, or the root is not there."
)
FOUND: Final = 1
USAGE: Final = 2
STORAGE: Final = 3
_WIDTH: Final = 400

_S3: Final = {"retry": {"attempts": 2, "seconds": 10.0}}
_SERVICE: Final = {"timeout_s": 5.0}
_HURRY: Final[Mapping[str, Mapping[str, Any]]] = {
    "s3": _S3,
    "s3a": _S3,
    "http": _SERVICE,
    "https": _SERVICE,
}
"""By scheme, the options with which a store over a network gives up soon."""

_PATH: Final = "check the path, its permissions and the space on its disk"
_NO_RIGHT: Final = ("AccessDenied", "Forbidden", "HTTP 403")
_CREDENTIALS: Final = (
    *_NO_RIGHT,
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "NoCredentialsError",
    "ProfileNotFound",
    "SignatureDoesNotMatch",
)
_NO_SERVER: Final = ("EndpointConnectionError", "Invalid endpoint", "no answer in time", "SSL")
_S3_REMEDIES: Final = (
    (("NoSuchBucket",), "create the bucket, or check its name, {option} and AWS_ENDPOINT_URL"),
    (_CREDENTIALS, "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, …) and their rights"),
    (_NO_SERVER, "check that a server runs there, {option} and AWS_ENDPOINT_URL"),
)
_REMEDIES: Final = (
    (("s3://", "s3a://"), "check the URL, the AWS_* variables and {option}"),
    (("http://", "https://"), "check that a service runs at the address, and CKPT_TOKEN"),
    (("://",), "check the URL and the credentials of its store"),
)


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
AsLines = Annotated[bool, typer.Option("--json", help="Print events, one JSON object a line.")]


def refuse_both(step: int | None, version: str | None) -> None:
    """Refuse a step and a version at once."""
    if step is not None and version is not None:
        raise ConfigError("--step and --version exclude each other: name one of them")


def store_options(url: str, endpoint_url: str | None) -> dict[str, Any] | None:
    """The storage options that go with a URL.

    Raises:
        ConfigError: an endpoint that is no address, or one with credentials.
    """
    if endpoint_url is None or local_directory(url) is not None:
        return None
    parts = urlsplit(endpoint_url)
    if "@" in parts.netloc:
        msg = "--endpoint-url must hold no credentials; use the AWS_* environment or a profile"
        raise ConfigError(msg)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        msg = f"--endpoint-url must be http://host[:port] or https://…, got {endpoint_url!r}"
        raise ConfigError(msg)
    return {"endpoint_url": endpoint_url}


def open_root(url: str, endpoint_url: str | None) -> Storage:
    """The store of a run's root that must be there, and must answer.

    Raises:
        ConfigError: an unusable URL.
        NoCheckpoint: a local directory that is something else.
        StorageError: there is no such directory, or nobody answers at the address.
    """
    storage = open_place(url, endpoint_url)
    local = local_directory(url)
    if local is not None:
        refuse_other(local)
    return storage


def open_place(url: str, endpoint_url: str | None) -> Storage:
    """The store of any place that must be there, and must answer.

    Raises:
        ConfigError: an unusable URL.
        StorageError: there is no such directory, or nobody answers at the address.
    """
    refuse_missing(url)
    options = store_options(url, endpoint_url)
    ask(url, options)
    return open_storage(url, options)


def refuse_missing(url: str) -> None:
    """Refuse a local directory that is not there.

    Raises:
        ObjectNotFound: it is not there, or no directory.
        OSError: it may not be looked at.
    """
    local = local_directory(url)
    if local is None:
        return
    if not local.is_dir():
        scheme, one_slash, _rest = url.partition(":/")
        if one_slash and scheme in _HURRY:
            raise ObjectNotFound(f"{url} is no URL; write {scheme}:// with two slashes")
        what = f"{local} is no directory" if local.exists() else f"no such directory: {local}"
        raise ObjectNotFound(what)


def ask(url: str, options: Mapping[str, Any] | None) -> None:
    """Ask a store over a network one small thing, and do not wait long for its answer.

    What is under way for an hour should outlast a store that is away for a minute, and does. But
    a command that was only just begun, with a wrong address perhaps, ends within seconds.

    Raises:
        StorageError: no answer, or one that says that nothing can be there.
    """
    hurry = _HURRY.get(urlsplit(url).scheme)
    if hurry is None:
        return
    storage = open_storage(url, {**(options or {}), **hurry})
    try:
        storage.list(WRITERS)
    except StorageError as error:
        if any(word in str(error) for word in _NO_RIGHT):
            return  # an answer: not every role may list everything, and the command finds out
        endpoint = _endpoint(url, options)
        if endpoint is None or endpoint in str(error):
            raise
        # It may be another than was thought, which no answer of a server tells.
        raise type(error)(f"{error} (asked at {endpoint})") from error
    finally:
        storage.close()


def _endpoint(url: str, options: Mapping[str, Any] | None) -> str | None:
    """Where an S3 store is asked, if that was said on the command line or by a variable."""
    if not url.startswith(("s3://", "s3a://")):
        return None
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    endpoint = (options or {}).get("endpoint_url") or next(filter(None, named), None)
    return None if endpoint is None or "://" not in endpoint else public_url(endpoint)


def in_a_hurry(url: str, endpoint_url: str | None) -> Storage:
    """The store of a root, with few repetitions: for looking at the store itself."""
    refuse_missing(url)
    options = {**(store_options(url, endpoint_url) or {}), **_HURRY.get(urlsplit(url).scheme, {})}
    return open_storage(url, options or None)


@contextlib.contextmanager
def reported(as_json: bool, *, verifiable: bool = True, lines: bool = False) -> Iterator[None]:
    """Turn errors of the package into one line, a remedy and an exit status.

    Args:
        as_json: print the error as a document as well.
        verifiable: what may be damaged is ours, so that ``ckpt verify`` can say more.
        lines: the document is one line, as the events of a long-running command are.
    """
    try:
        yield
    except CkptError as error:
        status, hint = _status(error, verifiable)
        _report(error, f"{_one_line(str(error))}{hint}", as_json=as_json, lines=lines)
        raise typer.Exit(status) from None
    except BrokenPipeError:
        raise  # whoever reads the output has seen enough
    except OSError as error:
        what = _one_line(error.strerror or str(error))
        message = what if error.filename is None else _one_line(f"{error.filename}: {what}")
        _report(error, f"{message}; {_PATH}", as_json=as_json, lines=lines)
        raise typer.Exit(STORAGE) from None


def _report(error: Exception, message: str, *, as_json: bool, lines: bool) -> None:
    if as_json:
        document = {"error": {"type": type(error).__name__, "message": message}}
        if lines:
            write_line(document)
        else:
            write_json(document)
    complain(message)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _status(error: CkptError, verifiable: bool) -> tuple[int, str]:
    """The exit status of an error, and what to do about it where its message cannot know."""
    if isinstance(error, AlreadyExists | ConfigError | NoCheckpoint | ReadOnly | StepExists):
        return USAGE, ""
    if isinstance(error, PublishError) and isinstance(error.__cause__, CkptError):
        return _status(error.__cause__, verifiable)
    if isinstance(error, StoreNotExclusive):
        return STORAGE, ""
    if isinstance(error, StorageError):
        missing = isinstance(error, ObjectNotFound)
        return STORAGE, f"; {store_remedy(str(error), missing=missing)}"
    if isinstance(error, DamagedError):
        more = "`ckpt verify` tells what else is damaged"
        return FOUND, f"; {more if verifiable else 'copy or make it anew'}"
    if isinstance(error, HandoffTimeout):
        return FOUND, "; `ckpt versions` shows what there is, and --wait waits longer"
    if isinstance(error, NonFiniteError):
        return FOUND, "; take an older step"
    return FOUND, ""


def store_remedy(message: str, *, missing: bool = False, option: str = "--endpoint-url") -> str:
    """What to look at when a store failed, by the address that the message names.

    Args:
        message: what is said of it.
        missing: a path names nothing.
        option: where a command takes the endpoint of S3.
    """
    for schemes, remedy in _REMEDIES:
        if any(scheme in message for scheme in schemes):
            known = _S3_REMEDIES if "s3://" in schemes else ()
            found = (more for words, more in known if any(word in message for word in words))
            return next(found, remedy).format(option=option)
    return "check the path" if missing else _PATH


def complain(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"ckpt: {message}\n")


def write_json(document: Mapping[str, Any]) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_line(document: Mapping[str, Any]) -> None:
    """One JSON object as a line on standard output, at once."""
    sys.stdout.write(json.dumps(document, ensure_ascii=True, default=str) + "\n")
    sys.stdout.flush()


def output_console() -> Console:
    """Where tables go."""
    console = Console(highlight=False)
    # Rich cuts what a line has no room for, but a name must be whole to be copied, so a long line
    # is left to the terminal to wrap. The longest name of a version has 100 characters.
    return Console(highlight=False, width=max(console.width, _WIDTH))
