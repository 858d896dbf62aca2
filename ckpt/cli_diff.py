"""``ckpt diff``: what changed between two steps or two adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from .adapter_file import open_adapter
from .catalog import find_step
from .cli_console import (
    FOUND,
    AsJson,
    Endpoint,
    Url,
    open_place,
    open_root,
    output_console,
    reported,
    store_options,
    write_json,
)
from .cli_progress import watching
from .cli_tables import base_json
from .diff import AdapterSide, Side, StepSide, TensorDifference, compare, fields
from .errors import ConfigError, NoCheckpoint
from .manifest import StepManifest
from .peft import WEIGHTS_NAME, local_directory
from .storage import Storage, open_storage
from .versions import find_version

_STEP: Final = re.compile(r"(?P<step>\d{1,12})(?:\.w(?P<epoch>\d{1,4}))?")
_SHOWN: Final = 20


@dataclass(frozen=True)
class _Chosen:
    """One side of the comparison, and what is compared beside its tensors."""

    said: str
    storage: Storage
    size: int
    side: Side
    facts: Mapping[str, Any]


def diff_command(
    url: Url,
    first: Annotated[
        str, typer.Argument(help="A step (40, or 40.w2 of writer 2), or a version's name.")
    ],
    second: Annotated[
        str | None, typer.Argument(help="The same; by default the one of --other with that name.")
    ] = None,
    other: Annotated[
        str | None,
        typer.Option("--other", help="Root of the second, or a PEFT directory (then alone)."),
    ] = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help=f"List every difference, not the {_SHOWN} largest.")
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Say what changed between two steps or two adapters; ends with 0 if they are equal."""
    with reported(as_json):
        if second is None and other is None:
            raise ConfigError("name a second step or version, or --other ROOT to compare with")
        one = _choose(url, first, endpoint_url)
        two = _second(url, first, second, other, endpoint_url)
        facts = fields(one.facts, two.facts)
        stores, total = (one.storage, two.storage), one.size + two.size
        with watching("comparing", *stores, total=total, as_json=as_json):
            found = sorted(compare(one.side, two.side), key=_size, reverse=True)
        if as_json:
            rows = [
                {**asdict(row), "largest": _finite(row.largest), "relative": _finite(row.relative)}
                for row in found
            ]
            write_json(
                {
                    "first": one.said,
                    "second": two.said,
                    "equal": not found and not facts,
                    "tensors": len({*one.side.tensors, *two.side.tensors}),
                    "fields": {name: list(pair) for name, pair in facts.items()},
                    "differences": rows,
                }
            )
        else:
            _print(one, two, facts, found, all_tensors=all_tensors)
        if found or facts:
            raise typer.Exit(FOUND)


def _second(
    url: str, first: str, second: str | None, other: str | None, endpoint_url: str | None
) -> _Chosen:
    if other is None or second is not None:
        return _choose(url if other is None else other, second or first, endpoint_url)
    local = local_directory(other)
    may_be_bare = local is None or local.is_dir()
    if may_be_bare and open_place(other, endpoint_url).exists("adapter_config.json"):
        return _adapter(other, endpoint_url)
    return _choose(other, first, endpoint_url)


def _choose(url: str, what: str, endpoint_url: str | None) -> _Chosen:
    storage = open_root(url, endpoint_url)
    match = _STEP.fullmatch(what)
    if match is None:
        entry = find_version(storage, what)
        if entry.state != "committed":
            raise NoCheckpoint(f"version {what} is {entry.state}: {entry.problem or 'no manifest'}")
        return _adapter(f"{url.rstrip('/')}/{entry.path}", endpoint_url)
    epoch = match["epoch"]
    step = find_step(storage, int(match["step"]), epoch=None if epoch is None else int(epoch))
    if step.manifest is None:
        raise NoCheckpoint(f"step {what} has no manifest: {step.problem}")
    side = StepSide(storage, step.path, step.manifest)
    size = step.bytes or 0
    return _Chosen(f"{storage.url}/{step.path}", storage, size, side, _step_facts(step.manifest))


def _adapter(url: str, endpoint_url: str | None) -> _Chosen:
    storage = open_storage(url, store_options(url, endpoint_url))
    side = AdapterSide(open_adapter(storage))
    return _Chosen(storage.url, storage, storage.size(WEIGHTS_NAME), side, side.config)


def _step_facts(manifest: StepManifest) -> dict[str, Any]:
    """What a step holds beside tensors; its number, time and data position differ by nature."""
    return {
        "base": base_json(manifest.base),
        "peft_config": None if manifest.export is None else dict(manifest.export.peft_config),
    }


def _size(row: TensorDifference) -> float:
    """What is only on one side, or of another shape, first; then by relative difference."""
    return math.inf if row.relative is None else row.relative


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _print(
    one: _Chosen,
    two: _Chosen,
    facts: Mapping[str, tuple[Any, Any]],
    found: Sequence[TensorDifference],
    *,
    all_tensors: bool,
) -> None:
    console = output_console()
    console.print(Text(f"first   {one.said}\nsecond  {two.said}"))
    for name, (a, b) in facts.items():
        console.print(Text(f"{name}: {a!r} -> {b!r}", style="yellow"), soft_wrap=True)
    if found:
        table = Table(box=None, pad_edge=False)
        for column in ("tensor", "differs by", "first", "second"):
            table.add_column(column)
        table.add_column("relative", justify="right")
        table.add_column("largest", justify="right")
        for row in found if all_tensors else found[:_SHOWN]:
            numbers = ("-" if v is None else f"{v:.3g}" for v in (row.relative, row.largest))
            table.add_row(row.name, row.kind.value, row.first or "-", row.second or "-", *numbers)
        console.print(table)
        if not all_tensors and len(found) > _SHOWN:
            console.print(Text(f"and {len(found) - _SHOWN} more (--all)", style="dim"))
    total = len({*one.side.tensors, *two.side.tensors})
    verdict = f"{len(found)} of {total} tensors differ" if found else f"{total} tensors are equal"
    console.print(Text(verdict, style="bold"))
