"""``ckpt doctor``: what a root will and will not guarantee."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from .cli_console import (
    FOUND,
    STORAGE,
    AsJson,
    Endpoint,
    Url,
    complain,
    in_a_hurry,
    output_console,
    reported,
    store_remedy,
    write_json,
)
from .cli_progress import watching
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
        storage = in_a_hurry(url, endpoint_url)
        console = output_console()
        checks: list[Check] = []
        examination = examine(storage, size=size << 20)
        while True:
            with watching("trying", storage, as_json=as_json):
                check = next(examination, None)
            if check is None:
                break
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
        if len(checks) == 1 and not ok:  # it could not even be listed
            complain(f"{checks[0].found}; {store_remedy(checks[0].found)}")
            raise typer.Exit(STORAGE)
        if not ok:
            raise typer.Exit(FOUND)
