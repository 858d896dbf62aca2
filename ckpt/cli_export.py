"""``ckpt export``: the adapter of a step or version, or a step for stock DCP."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from . import cli_tables as show
from .catalog import find_step
from .cli_console import (
    AsJson,
    Dtype,
    Endpoint,
    Epoch,
    Step,
    Url,
    Version,
    ask,
    open_root,
    output_console,
    refuse_both,
    reported,
    store_options,
    write_json,
)
from .cli_convert import export_to_dcp
from .cli_progress import progress, watching
from .consolidate import consolidate
from .errors import ConfigError
from .export_layouts import Layout, Place, default_name, place, write_placed
from .peft import WrittenAdapter
from .types import ExpertForm
from .versions import export_version, find_version


class Experts(StrEnum):
    """How adapters on the experts of a mixture are written; see :mod:`ckpt.expert_form`."""

    single = "single"
    stacked = "stacked"


class Format(StrEnum):
    """What an export writes."""

    peft = "peft"
    dcp = "dcp"


def export_command(
    url: Url,
    out: Annotated[
        str, typer.Argument(help="The directory to make (with --layout: to make it in).")
    ],
    step: Step = None,
    epoch: Epoch = None,
    version: Version = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Of the tensors; bfloat16 by default.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an adapter that is at OUT already.")
    ] = False,
    form: Annotated[
        Format, typer.Option("--format", help="A PEFT directory, or a checkpoint of stock DCP.")
    ] = Format.peft,
    layout: Annotated[
        Layout, typer.Option("--layout", help="Whose directory of adapters OUT is, if it is one.")
    ] = Layout.peft,
    experts: Annotated[
        Experts | None,
        typer.Option(
            "--experts", help="Adapters of a layer's experts: each by itself, or stacked."
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", help="With --layout: the adapter's name; the version's by default."),
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Write the adapter of a step (by default the newest) or a version; or a step for stock DCP."""
    with reported(as_json):
        refuse_both(step, version)
        if form is Format.dcp:
            given = (version, dtype, experts, overwrite or None)
            if given != (None,) * len(given) or layout is not Layout.peft:
                names = "--version, --dtype, --experts, --layout and --overwrite"
                raise ConfigError(f"{names} are for --format peft")
            export_to_dcp(url, out, step, epoch, endpoint_url, as_json)
            return
        if version is not None and dtype is not None:
            raise ConfigError("a version is copied as it was published: leave --dtype out")
        if version is not None and experts is not None:
            raise ConfigError("a version is copied as it was published: leave --experts out")
        if layout is Layout.peft and name is not None:
            raise ConfigError("--name goes with --layout; without it, OUT is the directory itself")
        if layout is not Layout.peft and overwrite:
            raise ConfigError(
                f"{layout.value} caches adapters by name, so what is there is never replaced: "
                "leave --overwrite out and choose another name"
            )
        _export_peft(
            url,
            out,
            step=step,
            epoch=epoch,
            version=version,
            dtype=(dtype or Dtype.bfloat16).value,
            experts=None if experts is None else experts.value,
            overwrite=overwrite,
            layout=layout,
            name=name,
            endpoint_url=endpoint_url,
            as_json=as_json,
        )


def _export_peft(
    url: str,
    out: str,
    *,
    step: int | None,
    epoch: int | None,
    version: str | None,
    dtype: str,
    experts: ExpertForm | None,
    overwrite: bool,
    layout: Layout,
    name: str | None,
    endpoint_url: str | None,
    as_json: bool,
) -> None:
    storage = open_root(url, endpoint_url)
    options = store_options(out, endpoint_url)
    ask(out, options)
    if version is None and name is None and layout is not Layout.peft:
        entry = find_step(storage, step, epoch=epoch)
        step, epoch = entry.step, entry.epoch  # a newer one may be committed meanwhile
        name = default_name(url, step)
    where = place(layout, out, name or version or "", storage_options=options)
    source, used = "", dtype

    def write(target: str) -> WrittenAdapter:
        nonlocal source, used
        if version is not None:
            # Once to verify it, and once more to copy it.
            total = 2 * (find_version(storage, version).bytes or 0)
            with watching("exporting", storage, total=total, as_json=as_json):
                manifest, written = export_version(
                    storage, version, target, overwrite=overwrite, out_storage_options=options
                )
            source, used = version, manifest.dtype
            return written
        with progress("exporting", as_json=as_json) as advance:
            result = consolidate(
                url,
                step,
                target,
                epoch=epoch,
                dtype=dtype,
                experts=experts,
                overwrite=overwrite,
                storage_options=store_options(url, endpoint_url),
                out_storage_options=options,
                on_bytes=advance,
            )
        source = f"step {result.step} (writer {result.epoch})"
        return result.written

    written = write_placed(where, write)
    _report(where, written, source, used, as_json=as_json)


def _report(
    where: Place, written: WrittenAdapter, source: str, used: str, *, as_json: bool
) -> None:
    if as_json:
        document = {
            "source": source,
            "out": where.url,
            "dtype": used,
            "adapter_sha256": written.sha256,
            "files": [show.file_json(file) for file in written.files],
        }
        write_json({**document, "use": dict(where.use)} if where.use else document)
        return
    size = sum(file.size for file in written.files)
    facts = [
        ("exported", source),
        ("to", where.url),
        ("size", f"{show.size_text(size)}, {used}"),
        ("SHA-256", written.sha256),
        *where.use.items(),
    ]
    output_console().print(show.facts_table(facts))
