"""The command that finishes the queue of a trainer that is gone: mirror."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .cli_console import (
    FOUND,
    AsJson,
    Endpoint,
    Url,
    ask,
    complain,
    output_console,
    reported,
    store_options,
    write_json,
)
from .cli_progress import watching
from .errors import ConfigError
from .layout import TIER
from .storage import open_storage
from .tier import local_root
from .upload import drain

TierPath = Annotated[
    str, typer.Argument(help="The local tier: the directory that was given as local_tier.")
]


def mirror_command(
    url: Url, tier: TierPath, endpoint_url: Endpoint = None, as_json: AsJson = False
) -> None:
    """Put everything at the root that a local tier holds and the root does not have."""
    with reported(as_json):
        if not Path(local_root(tier), TIER).is_file():
            raise ConfigError(
                f"{tier} is no local tier: it has no {TIER}; name the directory that the trainer "
                "was given as local_tier"
            )
        options = store_options(url, endpoint_url)
        ask(url, options)
        remote = open_storage(url, options)
        try:
            with watching("mirroring", remote, as_json=as_json):
                done, left, problems = drain(tier, remote)
        finally:
            remote.close()
        if as_json:
            settled = {name: outcome.value for name, outcome in sorted(done.items())}
            waiting = [item.name for item in left]
            write_json({"settled": settled, "waiting": waiting, "problems": problems})
        else:
            console = output_console()
            for name, outcome in sorted(done.items()):
                console.print(Text(f"{name}  {outcome.value}"), soft_wrap=True)
            mirrored = sum(outcome.value == "mirrored" for outcome in done.values())
            console.print(Text(f"{mirrored} mirrored to {remote.url}", style="bold"))
        for problem in problems:
            complain(problem)
        for item in left:
            complain(f"{item.name} waits for the parts of other nodes")
        if problems or left:
            raise typer.Exit(FOUND)
