"""The commands of ``ckpt`` that convert between formats: import, and export to stock DCP."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import cli_tables as show
from .cli_console import (
    AsJson,
    Dtype,
    Endpoint,
    open_root,
    output_console,
    reported,
    store_options,
    write_json,
)
from .dcp.exporting import export_checkpoint
from .dcp.importing import import_checkpoint
from .dcp.mapping import Choices
from .dcp.stock import METADATA
from .errors import ConfigError, NoCheckpoint
from .layout import step_dir, version_dir
from .peft import CONFIG_NAME
from .peft_import import import_adapter

_DEFAULT_MODEL = "model"
_DEFAULT_RUN = "run"

_DCP_ONLY = "--step, --model, --optim, --optimizer and --skip are for DCP checkpoints"
_PEFT_ONLY = "--run and --dtype are for PEFT directories"


def import_command(
    source: Annotated[
        str, typer.Argument(help="A directory (or URL) of stock DCP, or a local PEFT directory.")
    ],
    root: Annotated[str, typer.Argument(help="Root of the run: a directory or a URL.")],
    step: Annotated[
        int | None, typer.Option("--step", min=0, help="DCP: number of the new step; 0 by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="DCP: prefix of the model's names ('' if none)."),
    ] = None,
    optim: Annotated[
        str | None, typer.Option("--optim", help="DCP: prefix of the optimizer's names.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="DCP: class of the optimizer, e.g. AdamW.")
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option("--skip", help="DCP: leave this name out; may be repeated.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="PEFT: first part of the version's name.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="PEFT: what the tensors are cast to.")
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Make a checkpoint of stock DCP a run's first step, or a PEFT directory its next version."""
    with reported(as_json, verifiable=False):
        found = open_root(source, endpoint_url)
        if found.exists(METADATA):
            if run is not None or dtype is not None:
                raise ConfigError(f"{_PEFT_ONLY}; {source} is a DCP checkpoint")
            choices = Choices(
                _DEFAULT_MODEL if model is None else model, optim, optimizer, tuple(skip or ())
            )
            _import_checkpoint(source, root, step or 0, choices, endpoint_url, as_json)
        elif found.exists(CONFIG_NAME):
            if any(value is not None for value in (step, model, optim, optimizer, skip or None)):
                raise ConfigError(f"{_DCP_ONLY}; {source} is a PEFT directory")
            _import_adapter(source, root, run or _DEFAULT_RUN, dtype, endpoint_url, as_json)
        else:
            msg = f"{found.url} is neither a DCP checkpoint ({METADATA}) nor a PEFT directory"
            raise NoCheckpoint(f"{msg} ({CONFIG_NAME})")


def _import_checkpoint(
    source: str,
    root: str,
    step: int,
    choices: Choices,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    result = import_checkpoint(
        source,
        root,
        step=step,
        choices=choices,
        source_options=store_options(source, endpoint_url),
        storage_options=store_options(root, endpoint_url),
    )
    manifest = result.manifest
    size = sum(file.size for file in manifest.files)
    path = step_dir(manifest.step, manifest.epoch)
    if as_json:
        document: dict[str, Any] = {
            "source": source,
            "path": path,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "tensors": len(manifest.tensors),
            "entries": result.entries,
            "skipped": list(result.skipped),
            "bytes": size,
        }
        write_json(document)
        return
    facts = [
        ("imported", f"step {manifest.step} (writer {manifest.epoch})"),
        ("to", f"{root}/{path}"),
        ("tensors", f"{len(manifest.tensors)}, {show.size_text(size)}"),
        ("other entries", str(result.entries)),
    ]
    if result.skipped:
        facts.append(("left out", ", ".join(result.skipped)))
    output_console().print(show.facts_table(facts))


def _import_adapter(
    source: str,
    root: str,
    run: str,
    dtype: Dtype | None,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    manifest = import_adapter(
        source,
        root,
        run=run,
        dtype=None if dtype is None else dtype.value,
        storage_options=store_options(root, endpoint_url),
    )
    size = sum(file.size for file in manifest.files)
    path = version_dir(run, manifest.number)
    if as_json:
        write_json(
            {
                "source": source,
                "path": path,
                "version": manifest.name,
                "dtype": manifest.dtype,
                "adapter_sha256": manifest.adapter_sha256,
                "bytes": size,
            }
        )
        return
    facts = [
        ("imported", manifest.name),
        ("to", f"{root}/{path}"),
        ("size", f"{show.size_text(size)}, {manifest.dtype}"),
        ("SHA-256", manifest.adapter_sha256),
    ]
    output_console().print(show.facts_table(facts))


def export_to_dcp(
    url: str,
    out: str,
    step: int | None,
    epoch: int | None,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    """``ckpt export --format dcp``: write a step as stock DCP has it."""
    open_root(url, endpoint_url)
    result = export_checkpoint(
        url, out, step=step, epoch=epoch, storage_options=store_options(url, endpoint_url)
    )
    source = f"step {result.entry.step} (writer {result.entry.epoch})"
    if as_json:
        write_json(
            {
                "source": source,
                "out": out,
                "format": "dcp",
                "tensors": result.tensors,
                "bytes": result.size,
            }
        )
        return
    facts = [
        ("exported", source),
        ("to", out),
        ("tensors", f"{result.tensors}, {show.size_text(result.size)} in all"),
    ]
    output_console().print(show.facts_table(facts))
