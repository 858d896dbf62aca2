"""The commands of ``ckpt`` that convert between formats: import, and export to stock DCP."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import cli_tables as show
from .cli_console import (
    AsJson,
    Dtype,
    Endpoint,
    ask,
    open_place,
    open_root,
    output_console,
    reported,
    store_options,
    write_json,
)
from .cli_found import is_root, refuse_other
from .cli_progress import watching
from .dcp.exporting import export_checkpoint
from .dcp.importing import Imported, import_stock
from .dcp.mapping import Choices
from .dcp.stock import METADATA, StockCheckpoint
from .errors import ConfigError, NoCheckpoint
from .layout import step_dir, version_dir
from .manifest import VersionManifest
from .migrate.prime_rl import find_prime_rl, import_prime_rl
from .migrate.torchtune import find_torchtune, read_torchtune
from .migrate.verl import find_verl, import_verl
from .peft import CONFIG_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, local_directory
from .peft_import import import_adapter, publish_tensors

_DEFAULT_MODEL = "model"
_DEFAULT_RUN = "run"
_SHOWN = 8
_TRAINER_STATE = re.compile(
    r"(?:optimizer|scheduler|scaler)\.(?:pt|bin)|rng_state\S*\.pth|trainer_state\.json"
    r"|training_args\.bin|recipe_state(?:\.pt)?"
)
"""What transformers' Trainer and torchtune write beside an adapter."""

_KINDS = "DCP (.metadata), verl (model_world_size_*.pt), prime-rl (trainer/.metadata), PEFT"
_STEP_OPTIONS = {"step": "--step", "model": "--model", "optim": "--optim"}
_STEP_OPTIONS |= {"optimizer": "--optimizer", "skip": "--skip"}
_ADAPTER_OPTIONS = {"run": "--run", "dtype": "--dtype", "alpha": "--alpha"}
_ADAPTER_OPTIONS |= {"base_config": "--base-config"}


def import_command(
    source: Annotated[
        str,
        typer.Argument(
            help="What is imported: a directory (or URL) of stock DCP; a local directory of verl, "
            "prime-rl or PEFT; an adapter file of torchtune."
        ),
    ],
    root: Annotated[str, typer.Argument(help="Root of the run: a directory or a URL.")],
    step: Annotated[
        int | None,
        typer.Option("--step", min=0, help="Steps: number of the new step; the source's or 0."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="DCP: prefix of the model's names ('' if none)."),
    ] = None,
    optim: Annotated[
        str | None, typer.Option("--optim", help="DCP: prefix of the optimizer's names.")
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="Steps: class of the optimizer, e.g. AdamW.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", help="DCP, prime-rl: leave this name out; may be repeated."),
    ] = None,
    run: Annotated[
        str | None, typer.Option("--run", help="Adapters: first part of the version's name.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Adapters: what the tensors are cast to.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="torchtune: the recipe's lora_alpha.")
    ] = None,
    base_config: Annotated[
        Path | None, typer.Option("--base-config", help="torchtune: the base model's config.json.")
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Make another trainer's checkpoint a run's first step, or an adapter its next version."""
    given = {
        "step": step,
        "model": model,
        "optim": optim,
        "optimizer": optimizer,
        "skip": skip or None,
        "run": run,
        "dtype": dtype,
        "alpha": alpha,
        "base_config": base_config,
    }
    with reported(as_json, verifiable=False):
        ask(root, store_options(root, endpoint_url))
        _refuse_target(root)
        local = local_directory(source)
        if local is not None and local.is_file():
            tune = find_torchtune(local)
            if tune is None:
                raise NoCheckpoint(f"{local} is no adapter_model.pt or adapter_<N>.pt of torchtune")
            _import_tune(tune, root, given, endpoint_url, as_json)
            return
        found = open_place(source, endpoint_url)
        options = store_options(root, endpoint_url)
        if local is not None and (trainer := find_prime_rl(local)) is not None:
            _only(given, source, "prime-rl", {"step", "optimizer", "skip"})
            named: dict[str, Any] = {"optimizer": optimizer, "storage_options": options}
            with watching("importing", as_json=as_json):
                made = import_prime_rl(trainer, root, step=step, skip=tuple(skip or ()), **named)
            _show_step(source, root, made, as_json)
        elif found.exists(METADATA):
            _only(given, source, "DCP", set(_STEP_OPTIONS))
            prefix = _DEFAULT_MODEL if model is None else model
            size = sum(entry.size for entry in found.list(""))
            with watching("importing", found, total=size, as_json=as_json):
                made = import_stock(
                    StockCheckpoint(found),
                    root,
                    step or 0,
                    Choices(prefix, optim, optimizer, tuple(skip or ())),
                    storage_options=options,
                )
            _show_step(source, root, made, as_json)
        elif local is not None and (verl := find_verl(local)) is not None:
            _only(given, source, "verl", {"step", "optimizer"})
            with watching("importing", as_json=as_json):
                made = import_verl(
                    verl, root, step=step, optimizer=optimizer, storage_options=options
                )
            _show_step(source, root, made, as_json)
        elif found.exists(CONFIG_NAME) and (
            local is None or _has_weights(local) or find_torchtune(local) is None
        ):
            _only(given, source, "PEFT", {"run", "dtype"})
            cast = None if dtype is None else dtype.value
            with watching("importing", as_json=as_json):
                adapter = import_adapter(
                    source, root, run=run or _DEFAULT_RUN, dtype=cast, storage_options=options
                )
            _show_version(source, root, run or _DEFAULT_RUN, adapter, as_json)
        elif local is not None and (tune := find_torchtune(local)) is not None:
            _import_tune(tune, root, given, endpoint_url, as_json)
        elif local is not None and is_root(local):
            raise NoCheckpoint(
                f"{local} is the root of a run already, which every command reads as it is; of it, "
                f"a published version can be imported, as {local}/adapters/NAME"
            )
        else:
            msg = f"{found.url} is no checkpoint that is known here: {_KINDS} ({CONFIG_NAME})"
            raise NoCheckpoint(f"{msg}, torchtune (adapter_model.pt)")


def _refuse_target(root: str) -> None:
    """Refuse to make a root of what is something else, such as the source itself."""
    local = local_directory(root)
    if local is not None and local.is_dir():
        refuse_other(local)


def _has_weights(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME))


def _only(given: dict[str, Any], source: str, kind: str, known: set[str]) -> None:
    """Refuse options that mean nothing for this kind of source."""
    flags = _STEP_OPTIONS | _ADAPTER_OPTIONS
    wrong = [flag for name, flag in flags.items() if given[name] is not None and name not in known]
    if wrong:
        msg = f"{', '.join(wrong)}: not for a source of the kind {kind}, which {source} is"
        raise ConfigError(msg)


def _import_tune(
    file: Path, root: str, given: dict[str, Any], endpoint_url: str | None, as_json: bool
) -> None:
    _only(given, str(file), "torchtune", set(_ADAPTER_OPTIONS))
    run = given["run"] or _DEFAULT_RUN
    dtype = given["dtype"]
    with watching("importing", as_json=as_json):
        config, tensors = read_torchtune(
            file, alpha=given["alpha"], base_config=given["base_config"]
        )
        manifest = publish_tensors(
            config,
            tensors,
            root,
            where=str(file),
            run=run,
            dtype=None if dtype is None else dtype.value,
            storage_options=store_options(root, endpoint_url),
        )
    _show_version(str(file), root, run, manifest, as_json)


def _show_step(source: str, root: str, result: Imported, as_json: bool) -> None:
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
        names = ", ".join(result.skipped[:_SHOWN])
        more = len(result.skipped) - _SHOWN
        facts.append(("left out", names + (f" and {more} more" if more > 0 else "")))
    output_console().print(show.facts_table(facts))


def _beside(directory: Path | None) -> list[str]:
    """A trainer's own state beside an adapter: a version has no place for it."""
    if directory is None or not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if _TRAINER_STATE.fullmatch(p.name))


def _show_version(
    source: str, root: str, run: str, manifest: VersionManifest, as_json: bool
) -> None:
    size = sum(file.size for file in manifest.files)
    local = local_directory(source)
    skipped = _beside(local.parent if local is not None and local.is_file() else local)
    path = version_dir(run, manifest.number)
    if as_json:
        write_json(
            {
                "source": source,
                "path": path,
                "version": manifest.name,
                "dtype": manifest.dtype,
                "adapter_sha256": manifest.adapter_sha256,
                "skipped": skipped,
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
    if skipped:
        facts.append(("left out", ", ".join(skipped)))
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
    with watching("exporting", as_json=as_json):
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
