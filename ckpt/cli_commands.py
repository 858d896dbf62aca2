"""The commands of ``ckpt`` that look at a run (ls, inspect, verify), and all others gathered."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer
from rich.text import Text
from typer.core import TyperGroup

from . import cli_tables as show
from .about import package_version
from .catalog import Problem, StepEntry, check_step, check_writers, find_step, list_steps
from .cli_config import ENVIRONMENT, config_text, find_config, name_variables, read_config
from .cli_console import (
    EXIT_STATUS,
    FOUND,
    USAGE,
    AsJson,
    Endpoint,
    Epoch,
    Step,
    Url,
    Version,
    complain,
    open_root,
    output_console,
    refuse_both,
    reported,
    write_json,
)
from .cli_convert import import_command
from .cli_diff import diff_command
from .cli_doctor import doctor_command
from .cli_export import export_command
from .cli_group import JSON_ASKED, Group
from .cli_lint import lint_command
from .cli_mirror import mirror_command
from .cli_progress import progress, watching
from .cli_prune import pin_command, prune_command, unpin_command
from .cli_serve import serve_command
from .cli_sync import sync_command
from .cli_versions import publish_command, versions_command
from .errors import ConfigError, NoCheckpoint
from .storage import Storage
from .types import FileRecord
from .versions import (
    VersionEntry,
    check_version,
    find_version,
    list_versions,
)

_SHOWN_TENSORS: Final = 20
_PIPE_WIDTH: Final = 120

app = typer.Typer(
    name="ckpt",
    cls=Group,
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
)


def run() -> int:
    """Parse the command line and run it; the exit status."""
    logging.basicConfig(format="ckpt: %(message)s", level=logging.WARNING)
    try:
        app()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else USAGE
    return 0


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"ckpt {package_version()}\n")
        raise typer.Exit


app.command("import")(import_command)


@app.callback()
def top(
    context: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            envvar=ENVIRONMENT,
            help="TOML file with defaults for options; ckpt.toml here, if there is one.",
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print what every option is now, and from where.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Look at, verify, export and prune what a run saved: its steps and published adapters."""
    with reported(bool(context.meta.get(JSON_ASKED))):
        commands = cast("TyperGroup", context.command).commands
        name_variables(commands)
        path = find_config(config)
        if path is not None:
            context.default_map = read_config(path, commands)
        if print_config:
            sys.stdout.write(config_text(context, commands))
            raise typer.Exit
        if context.invoked_subcommand is None:
            raise ConfigError("name a command; `ckpt --help` lists them")


@app.command("ls")
def ls_command(url: Url, endpoint_url: Endpoint = None, as_json: AsJson = False) -> None:
    """List steps and published versions, with the state of each."""
    with reported(as_json):
        storage = open_root(url, endpoint_url)
        with watching("reading", storage, as_json=as_json):
            steps, versions = list_steps(storage), list_versions(storage)
        if as_json:
            write_json(
                {
                    "url": storage.url,
                    "steps": [show.step_json(entry) for entry in steps],
                    "versions": [show.version_json(entry) for entry in versions],
                }
            )
            return
        console = output_console()
        if not steps and not versions:
            console.print(Text(f"no steps and no versions in {storage.url}"))
        if steps:
            console.print(show.steps_table(steps))
        if steps and versions:
            console.print()
        if versions:
            console.print(show.versions_table(versions))
        entries: list[StepEntry | VersionEntry] = [*steps, *versions]
        for entry in entries:
            if entry.problem is not None:
                console.print(Text(f"{entry.path}: {entry.problem}", style="red"), soft_wrap=True)


@app.command("inspect")
def inspect_command(
    url: Url,
    step: Step = None,
    epoch: Epoch = None,
    version: Version = None,
    all_tensors: Annotated[
        bool, typer.Option("--all", help=f"List every tensor, not the first {_SHOWN_TENSORS}.")
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Show what a step (by default the newest) or a version holds."""
    with reported(as_json):
        refuse_both(step, version)
        storage = open_root(url, endpoint_url)
        if version is not None:
            _inspect_version(find_version(storage, version), as_json)
            return
        with watching("reading", storage, as_json=as_json):
            entry = find_step(storage, step, epoch=epoch)
        manifest = entry.manifest
        if manifest is None:
            raise NoCheckpoint(f"step {entry.step} has no manifest: {entry.problem}")
        if as_json:
            write_json(show.manifest_json(entry, manifest))
            return
        console = output_console()
        console.print(show.facts_table(show.step_facts(entry, manifest)))
        console.print()
        console.print(show.files_table(manifest.files))
        console.print()
        tensors = manifest.tensors if all_tensors else manifest.tensors[:_SHOWN_TENSORS]
        console.print(show.tensors_table(tensors, len(manifest.tensors)))


def _inspect_version(entry: VersionEntry, as_json: bool) -> None:
    files: tuple[FileRecord, ...] = () if entry.manifest is None else entry.manifest.files
    if as_json:
        manifest = entry.manifest
        write_json(
            {
                **show.version_json(entry),
                "base": None if manifest is None else show.base_json(manifest.base),
                "probe": None if manifest is None else manifest.probe,
                "files": [show.file_json(file) for file in files],
            }
        )
    else:
        console = output_console()
        console.print(show.facts_table(show.version_facts(entry)))
        if files:
            console.print()
            console.print(show.files_table(files))
    if entry.state == "damaged":
        complain(f"version {entry.name} is damaged: {entry.problem}")
        raise typer.Exit(FOUND)


@app.command("verify")
def verify_command(
    url: Url,
    step: Step = None,
    epoch: Epoch = None,
    version: Version = None,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Read every byte of all steps and versions, or of one, and compare the checksums."""
    with reported(as_json):
        refuse_both(step, version)
        storage = open_root(url, endpoint_url)
        with watching("reading", storage, as_json=as_json):
            steps, versions = _chosen(storage, step, epoch, version)
        entries: list[StepEntry | VersionEntry] = [*steps, *versions]
        total = sum(entry.bytes or 0 for entry in entries)
        with progress("verifying", total, as_json=as_json) as advance:
            results = [_verdict(item, check_step(storage, item, advance)) for item in steps]
            results += [_verdict(one, check_version(storage, one, advance)) for one in versions]
        if step is None and version is None:
            results += [_record_verdict(problem) for problem in check_writers(storage)]
        damaged = sum(1 for result in results if result["problems"])
        if as_json:
            write_json({"url": storage.url, "ok": not damaged, "checked": results})
        else:
            _print_verdicts(results, damaged)
        if damaged:
            raise typer.Exit(FOUND)


def _chosen(
    storage: Storage, step: int | None, epoch: int | None, version: str | None
) -> tuple[list[StepEntry], list[VersionEntry]]:
    if version is not None:
        return [], [find_version(storage, version)]
    steps = list_steps(storage)
    if step is None:
        versions = list_versions(storage)
        if not steps and not versions:
            raise NoCheckpoint(f"nothing to verify: no steps and no versions in {storage.url}")
        return steps, versions
    tries = [entry for entry in steps if entry.step == step and epoch in (None, entry.epoch)]
    if not tries:
        raise NoCheckpoint(f"no step {step} in {storage.url}; `ckpt ls` shows what there is")
    return tries, []


def _verdict(entry: StepEntry | VersionEntry, problems: Iterable[Problem]) -> dict[str, Any]:
    found = list(problems)
    return {
        "path": entry.path,
        "state": "damaged" if found else entry.state,
        "bytes": entry.bytes,
        "problems": [
            {"file": problem.file, "block": problem.block, "message": problem.message}
            for problem in found
        ],
    }


def _record_verdict(problem: Problem) -> dict[str, Any]:
    return {
        "path": problem.file,
        "state": "damaged",
        "bytes": None,
        "problems": [{"file": problem.file, "block": None, "message": problem.message}],
    }


def _print_verdicts(results: Sequence[Mapping[str, Any]], damaged: int) -> None:
    console = output_console()
    for result in results:
        line = show.state_text(str(result["state"]))
        line.append(f"  {result['path']}  {show.size_text(result['bytes'])}", style="default")
        console.print(line, soft_wrap=True)
        for problem in result["problems"]:
            block = "" if problem["block"] is None else f" (block {problem['block']})"
            text = f"    {problem['message']}{block}"
            console.print(Text(text, style="red"), soft_wrap=True)
    verdict = "every byte verifies" if not damaged else f"{damaged} of them damaged"
    console.print(Text(f"{len(results)} checked: {verdict}", style="bold"))


app.command("export")(export_command)
app.command("consolidate", help="Another name for `ckpt export`.")(export_command)
app.command("lint")(lint_command)
app.command("versions")(versions_command)
app.command("publish")(publish_command)
app.command("prune")(prune_command)
app.command("pin")(pin_command)
app.command("unpin")(unpin_command)
app.command("mirror")(mirror_command)
app.command("sync")(sync_command)
app.command("serve")(serve_command)
app.command("doctor")(doctor_command)
app.command("diff")(diff_command)

for _command in app.registered_commands:
    _command.epilog = EXIT_STATUS
