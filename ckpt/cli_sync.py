"""The command that runs beside inference engines: sync."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from .cli_console import AsLines, Endpoint, Url, complain, reported, store_options
from .cli_events import Events
from .errors import ConfigError
from .handoff.cache import VersionCache
from .handoff.engine import Engine
from .handoff.registry import Registry
from .handoff.replica_poster import ReplicaPoster
from .handoff.sizes import parse_size
from .handoff.sync import Sidecar, SyncConfig, default_holder
from .handoff.sync_http import Listen, SyncServer, read_token

ENGINE_KEY: Final = "CKPT_ENGINE_API_KEY"

log = logging.getLogger("ckpt.sync")


def sync_command(
    url: Url,
    run: Annotated[str, typer.Option("--run", help="First part of the versions' names.")],
    engine: Annotated[
        list[str],
        typer.Option("--engine", help="vllm+http://host:port or sglang+http://host:port; repeat."),
    ],
    cache: Annotated[
        Path,
        typer.Option("--cache", help="Directory for versions; the engines see it at this path."),
    ],
    max_size: Annotated[
        str, typer.Option("--max-size", help="Bound on the cache, such as 20GiB.")
    ] = "20GiB",
    grace: Annotated[
        float, typer.Option("--grace", help="Seconds a version stays after its last use.")
    ] = 300.0,
    slots: Annotated[
        int, typer.Option("--slots", help="Adapters that an engine may have loaded at once.")
    ] = 2,
    quorum: Annotated[
        int | None,
        typer.Option("--quorum", help="Engines that must prove a version; by default all."),
    ] = None,
    linger: Annotated[
        float, typer.Option("--linger", help="Seconds the old version stays loaded.")
    ] = 30.0,
    poll: Annotated[
        float | None, typer.Option("--poll", help="Seconds between looks at the root.")
    ] = None,
    check: Annotated[
        float, typer.Option("--check", help="Seconds between looks at the engines.")
    ] = 2.0,
    lease_ttl: Annotated[
        float, typer.Option("--lease-ttl", help="Seconds a lease lasts that is not renewed.")
    ] = 600.0,
    holder: Annotated[
        str | None,
        typer.Option("--holder", help="Name of the leases; by default of host, run and cache."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Name under which engines serve the base.")
    ] = None,
    engine_timeout: Annotated[
        float, typer.Option("--engine-timeout", help="Seconds one answer of an engine may take.")
    ] = 60.0,
    listen: Annotated[
        str, typer.Option("--listen", help="Where /healthz, /readyz and /metrics are answered.")
    ] = "127.0.0.1:9101",
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Holds the token that callers must show."),
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsLines = False,
) -> None:
    """Keep inference engines at the newest published version, proven, until a SIGTERM."""
    _log_to_stderr()
    with reported(as_json, lines=True):
        config = SyncConfig(
            run=run,
            holder=default_holder(socket.gethostname(), run, cache) if holder is None else holder,
            poll_s=poll,
            check_s=check,
            lease_ttl_s=lease_ttl,
            linger_s=linger,
            slots=slots,
            quorum=quorum,
        )
        where = Listen.parse(listen, None if token_file is None else read_token(token_file))
        engines = _open_engines(engine, base_model, engine_timeout)
        registry = Registry(url, run=run, storage_options=store_options(url, endpoint_url))
        held = VersionCache(
            cache,
            max_bytes=parse_size("--max-size", max_size),
            grace_s=grace,
            root=f"{registry.url} {run}",
        )
        sidecar = Sidecar(registry, engines, held, config)
        server = SyncServer(where, sidecar.status)
        poster = ReplicaPoster(registry.storage, sidecar.status, run=run, holder=config.holder)
        _work(sidecar, server, poster, engines, registry, held, Events(wanted=as_json))


def _open_engines(
    addresses: Sequence[str], base_model: str | None, timeout_s: float
) -> list[Engine]:
    """The drivers; they need httpx, which no other command does."""
    try:
        from .handoff.drivers import open_engine
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        msg = "ckpt sync needs httpx: pip install 'archon-lora[cli,handoff]'"
        raise ConfigError(msg) from None
    key = os.environ.get(ENGINE_KEY) or None
    return [
        open_engine(address, api_key=key, base_model=base_model, timeout_s=timeout_s)
        for address in addresses
    ]


def _work(
    sidecar: Sidecar,
    server: SyncServer,
    poster: ReplicaPoster,
    engines: Sequence[Engine],
    registry: Registry,
    cache: VersionCache,
    events: Events,
) -> None:
    stop = threading.Event()

    def ask_to_stop(number: int, _frame: object) -> None:
        # A second signal ends the process as it would have without us.
        signal.signal(number, signal.SIG_DFL)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask_to_stop)
    server.start()
    host, port = server.address
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    log.info("answering on %s", address)
    events.say("serving", addresses=[address])
    told = events.follow(lambda: ("status", sidecar.status.readiness()[1]), stop)
    poster.start()
    ended = sidecar.run(stop)
    poster.stop()
    server.close()
    for engine in engines:
        engine.close()
    cache.close()
    if told is not None:
        told.join()
    events.say("stopped")
    if ended:
        registry.close()
        log.info("stopped; the engines go on serving what they have")
        return
    # A request to a store that does not answer cannot be called back, and would hold the process.
    complain("stopped during a request to the store; the next start clears what it leaves")
    sys.stderr.flush()
    os._exit(0)


def _log_to_stderr() -> None:
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    logging.basicConfig(
        format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING
    )
    logging.getLogger("ckpt").setLevel(logging.INFO)
