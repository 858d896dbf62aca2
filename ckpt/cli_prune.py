"""The commands that decide what stays: prune, pin, unpin."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .catalog import find_step
from .cli_console import (
    AsJson,
    Endpoint,
    Epoch,
    Step,
    Url,
    Version,
    open_root,
    output_console,
    refuse_both,
    reported,
    write_json,
)
from .cli_progress import watching
from .cli_served import is_served, served_prune
from .cli_tables import size_text, state_text
from .cli_uploads import DEFAULT_AGE, age, upload_rows
from .errors import ConfigError, NoCheckpoint
from .holds import pin, pinned, remove_unless_held, unpin
from .layout import parse_step_dir, step_name
from .retain import review
from .storage import Storage
from .timeline import names_whole
from .timeline_store import record_removal
from .types import Retention
from .version_retain import apply_fate, review_versions


class Mode(StrEnum):
    """Which values of a metric are best."""

    max = "max"
    min = "min"


def prune_command(
    url: Url,
    keep_latest: Annotated[
        int | None, typer.Option("--keep-latest", min=1, help="Newest valid steps to keep.")
    ] = None,
    every: Annotated[
        int | None, typer.Option("--every", min=1, help="Keep multiples of this step number, too.")
    ] = None,
    best: Annotated[
        int | None, typer.Option("--best", min=1, help="Keep this many by --metric, too.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="A value that was given at the save.")
    ] = None,
    mode: Annotated[Mode, typer.Option("--mode", help="Which values are best.")] = Mode.max,
    keep_versions: Annotated[
        int | None, typer.Option("--keep-versions", min=1, help="Newest versions to keep.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Only versions of this run.")] = None,
    uploads: Annotated[
        bool, typer.Option("--uploads", help="Abort uploads to S3 that were never finished.")
    ] = False,
    older_than: Annotated[
        str, typer.Option("--older-than", help="Age of an upload that goes: 90s, 30m, 24h, 7d.")
    ] = DEFAULT_AGE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and why; delete nothing.")
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Delete steps and versions that no rule keeps, and unfinished uploads.

    What is pinned or leased always stays.
    """
    with reported(as_json):
        if keep_latest is None and keep_versions is None and not uploads:
            raise ConfigError(
                "name a rule: --keep-latest for steps, --keep-versions for versions, "
                "--uploads for unfinished uploads"
            )
        if keep_latest is None and (every, best, metric) != (None, None, None):
            raise ConfigError("--every, --best and --metric add to --keep-latest: name that, too")
        if (best is None) != (metric is None):
            raise ConfigError("--best and --metric belong together: name both or neither")
        rule = None
        if keep_latest is not None:
            rule = Retention(keep_latest, every, None, best, metric, mode.value)
        span = age(older_than) if uploads else None
        storage = open_root(url, endpoint_url)
        with watching("looking" if dry_run else "pruning", storage, as_json=as_json):
            if is_served(storage):
                if uploads:
                    raise ConfigError("--uploads works where the root is, not over a service")
                rules = {
                    "keep_latest": keep_latest,
                    "every": every,
                    "best": best,
                    "metric": metric,
                    "mode": mode.value,
                    "keep_versions": keep_versions,
                    "run_name": run,
                }
                rows = served_prune(storage, rules, dry_run=dry_run)
            else:
                rows = _prune(storage, rule, keep_versions, run, dry_run)
            if span is not None:
                rows += upload_rows(storage, span, dry_run=dry_run)
        if as_json:
            write_json({"url": storage.url, "dry_run": dry_run, "entries": rows})
            return
        _print(rows, storage.url, dry_run)


def _prune(
    storage: Storage, rule: Retention | None, versions: int | None, run: str | None, dry_run: bool
) -> list[dict[str, Any]]:
    rows = [] if rule is None else _steps(storage, rule, dry_run)
    if versions is not None:
        rows += _versions(storage, versions, run, dry_run)
    if not dry_run:  # a service records it itself
        gone = [row["path"].rpartition("/")[2] for row in rows if not row["keep"]]
        record_removal(storage, "ckpt prune", [name for name in gone if names_whole(name)])
    return rows


def _steps(storage: Storage, rule: Retention, dry_run: bool) -> list[dict[str, Any]]:
    rows = []
    for entry, fate in review(storage, rule):
        keep, reason = fate.keep, fate.reason
        if not keep and not dry_run:
            # A pin that was set a moment ago still counts.
            held = remove_unless_held(storage, step_name(entry.step, entry.epoch))
            keep, reason = held is not None, held or reason
        rows.append(_row(entry.path, entry.state, entry.bytes, keep, reason))
    return rows


def _versions(storage: Storage, count: int, run: str | None, dry_run: bool) -> list[dict[str, Any]]:
    rows = []
    for fate in review_versions(storage, count, run):
        keep, reason, entry = fate.keep, fate.reason, fate.entry
        if not keep and not dry_run:
            held = apply_fate(storage, fate)
            keep, reason = held is not None, held or reason
        rows.append(_row(entry.path, entry.state, entry.bytes, keep, reason))
    return rows


def _row(path: str, state: str, size: int | None, keep: bool, reason: str) -> dict[str, Any]:
    return {"path": path, "state": state, "bytes": size, "keep": keep, "reason": reason}


def _print(rows: list[dict[str, Any]], url: str, dry_run: bool) -> None:
    console = output_console()
    if not rows:
        console.print(Text(f"nothing to prune in {url}"))
        return
    goes = "would go" if dry_run else "removed"
    table = Table(box=None, pad_edge=False)
    for name in ("path", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in rows:
        verdict = Text("stays", style="green") if row["keep"] else Text(goes, style="yellow")
        size = size_text(row["bytes"])
        table.add_row(row["path"], state_text(row["state"]), size, verdict, row["reason"])
    console.print(table)
    gone = [row for row in rows if not row["keep"]]
    total = size_text(sum(row["bytes"] or 0 for row in gone))
    console.print(Text(f"{len(gone)} of {len(rows)} {goes}, {total}", style="bold"))


def pin_command(
    url: Url,
    step: Step = None,
    epoch: Epoch = None,
    version: Version = None,
    note: Annotated[str, typer.Option("--note", help="Why; for people.")] = "",
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Keep a step or version whatever retention says, until it is unpinned."""
    with reported(as_json):
        _one_of(step, version)
        storage = open_root(url, endpoint_url)
        if version is None:
            entry = find_step(storage, step, epoch=epoch)
            name = step_name(entry.step, entry.epoch)
        else:
            name = version
        record = pin(storage, name, note)
        _say({"pinned": record.name, "note": record.note}, f"pinned {record.name}", as_json)


def unpin_command(
    url: Url,
    step: Step = None,
    epoch: Epoch = None,
    version: Version = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Leave a step or version to retention again."""
    with reported(as_json):
        _one_of(step, version)
        storage = open_root(url, endpoint_url)
        names = sorted(
            name
            for name in pinned(storage)
            if name == version or (version is None and _is_step(name, step, epoch))
        )
        if not names:
            what = f"step {step}" if version is None else f"version {version!r}"
            raise NoCheckpoint(
                f"{what} of {storage.url} is not pinned; `ckpt prune --dry-run` says what is"
            )
        for name in names:
            unpin(storage, name)
        _say({"unpinned": names}, f"unpinned {', '.join(names)}", as_json)


def _is_step(name: str, step: int | None, epoch: int | None) -> bool:
    pair = parse_step_dir(name)
    return pair is not None and pair[0] == step and epoch in (None, pair[1])


def _one_of(step: int | None, version: str | None) -> None:
    refuse_both(step, version)
    if step is None and version is None:
        raise ConfigError("name what is meant: --step or --version")


def _say(document: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        write_json(document)
    else:
        output_console().print(Text(text))
