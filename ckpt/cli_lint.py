"""``ckpt lint``: what engines would make of an adapter directory."""

from __future__ import annotations

import json
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.text import Text

from .cli_console import (
    FOUND,
    AsJson,
    Endpoint,
    ask,
    output_console,
    refuse_missing,
    reported,
    store_options,
    write_json,
)
from .cli_progress import watching
from .errors import ConfigError
from .lint import ENGINES, BaseModel, Engine, Finding, LintLimits, Severity, lint_adapter
from .storage import open_storage

_CONFIG = "config.json"


class Consumer(StrEnum):
    """An engine that loads adapters."""

    peft = "peft"
    vllm = "vllm"
    sglang = "sglang"


def lint_command(
    url: Annotated[str, typer.Argument(help="An adapter's directory, local or a URL.")],
    consumers: Annotated[
        list[Consumer] | None,
        typer.Option("--for", help="Whose findings to show; may be repeated. All by default."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", help="The base model's directory (its config.json), local or a URL."
        ),
    ] = None,
    vllm_rank: Annotated[
        int, typer.Option("--vllm-max-lora-rank", help="--max-lora-rank that vLLM is started with.")
    ] = 16,
    sglang_rank: Annotated[
        int | None,
        typer.Option("--sglang-max-lora-rank", help="--max-lora-rank that SGLang is started with."),
    ] = None,
    values: Annotated[
        bool, typer.Option("--values/--no-values", help="Look at every value, for NaN.")
    ] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with 1 for warnings as well.")
    ] = False,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Say what PEFT, vLLM and SGLang would refuse, get wrong or die of in an adapter."""
    with reported(as_json, verifiable=False):
        engines: list[Engine] = [one.value for one in consumers or []] or list(ENGINES)
        limits = LintLimits(vllm_rank, sglang_rank)
        model = None if base is None else _read_base(base, endpoint_url)
        options = store_options(url, endpoint_url)
        refuse_missing(url)
        ask(url, options)
        with watching("linting", as_json=as_json):
            found = lint_adapter(
                url,
                engines=engines,
                limits=limits,
                base=model,
                read_values=values,
                storage_options=options,
            )
        errors = [one for one in found if one.severity is Severity.error]
        ok = not (found if strict else errors)
        if as_json:
            write_json(
                {
                    "url": url,
                    "engines": engines,
                    "base": None if model is None else model.model_type,
                    "values_read": values,
                    "ok": ok,
                    "findings": [asdict(one) for one in found],
                }
            )
        else:
            _print(found, engines, values=values)
        if not ok:
            raise typer.Exit(FOUND)


def _read_base(base: str, endpoint_url: str | None) -> BaseModel:
    """What the ``config.json`` in a directory (or the file itself) tells."""
    base = base.rstrip("/").removesuffix(f"/{_CONFIG}")
    refuse_missing(base)
    storage = open_storage(base, store_options(base, endpoint_url))
    try:
        config: Any = json.loads(storage.read(_CONFIG))
    except ValueError as error:
        raise ConfigError(f"{storage.url}/{_CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{storage.url}/{_CONFIG} must hold a JSON object")
    return BaseModel.from_config(config)


def _print(found: list[Finding], engines: list[Engine], *, values: bool) -> None:
    console = output_console()
    for one in found:
        line = Text()
        bad = one.severity is Severity.error
        line.append(f"{one.severity.value:7}", style="red" if bad else "yellow")
        line.append(f"  {one.engine:6}  {one.code}: {one.message}")
        console.print(line, soft_wrap=True)
        if one.engine == _last_engine(found, one):
            console.print(Text(f"         {one.remedy}", style="dim"), soft_wrap=True)
    for engine in engines:
        mine = [one for one in found if one.engine == engine]
        errors = [one for one in mine if one.severity is Severity.error]
        effects = sorted({one.effect.value for one in errors})
        verdict = ", ".join(effects) if errors else "no objection"
        warnings = len(mine) - len(errors)
        more = f" ({warnings} warning{'s' * (warnings != 1)})" if warnings else ""
        console.print(Text(f"{engine}: {verdict}{more}", style="bold"), soft_wrap=True)
    if not values:
        console.print(Text("values were not looked at"), soft_wrap=True)


def _last_engine(found: list[Finding], one: Finding) -> Engine:
    """The last engine with this finding: the remedy is said once, below it."""
    same = [x.engine for x in found if x.code == one.code and x.severity == one.severity]
    return same[-1]
