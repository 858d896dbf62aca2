"""The commands of ``ckpt`` about published versions: versions, publish."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from . import cli_tables as show
from .cli_console import (
    AsJson,
    Dtype,
    Endpoint,
    Epoch,
    Step,
    Url,
    open_root,
    output_console,
    reported,
    write_json,
)
from .cli_progress import watching
from .cli_served import is_served
from .errors import ConfigError
from .handoff import Registry
from .holds import Holds
from .layout import ADAPTERS, parse_version_name, version_name
from .publish import publish_step
from .storage import Storage
from .versions import VersionEntry, find_version, version_names

_SHOWN: Final = 20
_DEFAULT_RUN: Final = "run"

Run = Annotated[str | None, typer.Option("--run", help="Only versions of this run.")]


def versions_command(
    url: Url,
    run: Run = None,
    newest: Annotated[
        int, typer.Option("--newest", min=1, help="How many to show; only these are read.")
    ] = _SHOWN,
    newer_than: Annotated[
        str | None,
        typer.Option("--newer-than", help="Only versions above this one: its number or name."),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option("--wait", min=0, help="Wait so many seconds for one that is whole."),
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """List the newest published versions, and who holds each.

    With --wait, return as soon as there is a whole version (above --newer-than), or fail.
    """
    with reported(as_json):
        storage = open_root(url, endpoint_url)
        floor = _floor(newer_than)
        if wait is not None:
            with watching("waiting", storage, as_json=as_json):
                Registry(storage, run=run).wait_for(floor, timeout=wait)
        with watching("reading", storage, as_json=as_json):
            found = _above(storage, run, floor)
            entries = [find_version(storage, name) for name in found[-newest:]]
            holds = Holds(storage)
            kept = [holds.of(entry.name) for entry in entries]
        older = len(found) - len(entries)
        if as_json:
            rows = [
                {**show.version_json(entry), "held": held}
                for entry, held in zip(entries, kept, strict=True)
            ]
            write_json({"url": storage.url, "older": older, "versions": rows})
            return
        if not entries:
            output_console().print(Text(_none(storage, run)), soft_wrap=True)
            return
        _print(entries, kept, older)


def _floor(newer_than: str | None) -> int | str | None:
    if newer_than is None or not newer_than.isdecimal():
        return newer_than
    return int(newer_than)


def _above(storage: Storage, run: str | None, floor: int | str | None) -> list[str]:
    """Names above a floor, by one listing; a floor that is a name counts for its run."""
    number = -1
    if isinstance(floor, str):
        pair = parse_version_name(floor)
        if pair is None or run not in (None, pair[0]):
            of_run = "" if run is None else f" of run {run!r}"
            raise ConfigError(
                f"--newer-than takes the number or name of a version{of_run}, got {floor!r}"
            )
        run, number = pair
    elif floor is not None:
        number = floor
    return [version_name(*pair) for pair in version_names(storage, run) if pair[1] > number]


def _none(storage: Storage, run: str | None) -> str:
    """That there is no such version, and of which runs there are some if the name may be wrong."""
    said = f"no such versions in {storage.url}"
    runs = sorted({pair[0] for pair in version_names(storage, None)})
    return said if run is None or run in runs or not runs else f"{said}, but of {', '.join(runs)}"


def _print(entries: Sequence[VersionEntry], kept: Sequence[str | None], older: int) -> None:
    console = output_console()
    console.print(show.versions_table(entries, kept))
    if older:
        console.print(Text(f"{older} older; --newest shows more"))
    for entry in entries:
        if entry.problem is not None:
            console.print(Text(f"{entry.path}: {entry.problem}", style="red"), soft_wrap=True)


def publish_command(
    url: Url,
    step: Step = None,
    epoch: Epoch = None,
    run: Annotated[
        str | None,
        typer.Option(
            "--run",
            help="First part of the version's name: by default that of the versions there are, "
            f"or {_DEFAULT_RUN!r}.",
        ),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of the tensors.")] = Dtype.bfloat16,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Publish the adapter of a step (by default the newest whole one) as the next version."""
    with reported(as_json):
        storage = open_root(url, endpoint_url)
        if is_served(storage):
            raise ConfigError(f"{url} is only read; publish where the root itself can be reached")
        with watching("publishing", storage, as_json=as_json):
            manifest = publish_step(
                storage, step, run=run or _only_run(storage), epoch=epoch, dtype=dtype.value
            )
        size = sum(file.size for file in manifest.files)
        path = f"{ADAPTERS}/{manifest.name}"
        if as_json:
            document: dict[str, Any] = {
                "version": manifest.name,
                "path": path,
                "step": manifest.step,
                "policy_version": manifest.policy_version,
                "dtype": manifest.dtype,
                "adapter_sha256": manifest.adapter_sha256,
                "bytes": size,
            }
            write_json(document)
            return
        facts = [
            ("published", manifest.name),
            ("from", f"step {manifest.step}"),
            ("to", f"{url}/{path}"),
            ("size", f"{show.size_text(size)}, {manifest.dtype}"),
            ("SHA-256", manifest.adapter_sha256),
        ]
        output_console().print(show.facts_table(facts))


def _only_run(storage: Storage) -> str:
    runs = sorted({pair[0] for pair in version_names(storage)})
    if len(runs) > 1:
        raise ConfigError(f"there are versions of several runs ({', '.join(runs)}): name a --run")
    return runs[0] if runs else _DEFAULT_RUN
