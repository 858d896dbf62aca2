"""``ckpt doctor``: what a root will and will not guarantee."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from .cli_console import (
    FOUND,
    AsJson,
    Endpoint,
    Url,
    open_root,
    output_console,
    reported,
    write_json,
)
from .doctor import Check, State, examine

_STYLES = {State.ok: "green", State.warning: "yellow", State.failed: "red"}


def doctor_command(
    url: Url,
    size: Annotated[
        int, typer.Option("--size", min=1, max=1024, help="MiB with which throughput is measured.")
    ] = 16,
    endpoint_url: Endpoint = None,
    as_json: AsJson = False,
) -> None:
    """Try a root out: permissions, exclusive create, checksums, clock, latency, throughput."""
    with reported(as_json, verifiable=False):
        storage = open_root(url, endpoint_url)
        console = output_console()
        checks: list[Check] = []
        for check in examine(storage, size=size << 20):
            checks.append(check)
            if not as_json:
                line = Text(f"{check.state.value:8}", style=_STYLES[check.state])
                console.print(line.append(f"{check.name}: {check.found}", style="default"))
                console.print(Text(f"        {check.means}", style="dim"))
                if check.remedy:
                    console.print(Text(f"        remedy: {check.remedy}"))
        ok = all(check.state is not State.failed for check in checks)
        if as_json:
            document = {"url": storage.url, "ok": ok, "checks": [asdict(one) for one in checks]}
            write_json(document)
        else:
            verdict = "everything that is promised holds here" if ok else "not fit for checkpoints"
            console.print(Text(f"{storage.url}: {verdict}", style="bold"))
        if not ok:
            raise typer.Exit(FOUND)
