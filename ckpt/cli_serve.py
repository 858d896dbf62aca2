"""The command that answers over HTTP: serve."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_console import AsLines, Endpoint, reported, store_options
from .cli_events import Events
from .errors import ConfigError
from .peft import local_directory

if TYPE_CHECKING:  # an extra, which no other command needs
    from .service.server import Service

_EXTRA = frozenset(
    {"fastapi", "uvicorn", "prometheus_client", "starlette", "pydantic", "h11", "jinja2"}
)

log = logging.getLogger("ckpt.service")


def serve_command(
    root: Annotated[
        list[str],
        typer.Option("--root", help="URL, or NAME=URL, of a run's root; repeat."),
    ],
    listen: Annotated[
        str, typer.Option("--listen", help="HOST:PORT; other than loopback needs tokens.")
    ] = "127.0.0.1:8080",
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Lines of SCOPE TOKEN [NAME]; scopes: read lease admin."),
    ] = None,
    presign: Annotated[
        bool, typer.Option("--presign", help="Let downloads be redirected to signed S3 URLs.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=0, help="Jobs at one time; 0 for none.")] = 2,
    poll: Annotated[
        float | None, typer.Option("--poll", help="Seconds between looks while somebody waits.")
    ] = None,
    rate: Annotated[
        float, typer.Option("--rate", min=1, help="Requests a second of one caller; 4 s at once.")
    ] = 500.0,
    drain: Annotated[
        float, typer.Option("--drain", help="Seconds that callers get to end at a SIGTERM.")
    ] = 10.0,
    host_name: Annotated[
        list[str] | None,
        typer.Option("--host-name", help="Name in the Host header to answer without tokens."),
    ] = None,
    endpoint_url: Endpoint = None,
    as_json: AsLines = False,
) -> None:
    """Answer over HTTP what roots hold: runs, steps, versions, events, downloads, jobs."""
    events = Events(wanted=as_json)
    with reported(as_json, lines=True):
        try:
            from .service import Limits, RootSpec, ServiceConfig
            from .service.auth import TokenSet
            from .service.server import Service, log_to_stderr
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            msg = f"ckpt serve needs {error.name}: pip install 'archon-lora[cli,service]'"
            raise ConfigError(msg) from None
        host, port = _address(listen)
        specs = [RootSpec.parse(text) for text in root]
        config = ServiceConfig(
            roots=[
                RootSpec(spec.name, spec.url, store_options(spec.url, endpoint_url))
                for spec in specs
            ],
            host=host,
            port=port,
            tokens=TokenSet.read(token_file),
            presign=presign,
            job_workers=jobs,
            poll_s=poll,
            drain_s=drain,
            limits=Limits(per_second=rate, burst=int(4 * rate)),
            allowed_hosts=frozenset(name.lower() for name in host_name or ()),
        )
        service = Service(config)
        log_to_stderr()
        for spec in specs:
            local = local_directory(spec.url)
            if local is not None and not local.is_dir():
                log.warning("%s: no such directory yet: %s; waiting for it", spec.name, local)
        # Uvicorn ends itself in good order, and then sends the signal once more to whoever had it
        # before: that was to be the end, and is not a reason to die of it.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: service.stop())
        ended = threading.Event()
        told = events.follow(lambda: _serving(service, specs), ended, once=True)
        served = service.run()
        ended.set()
        if told is not None:
            told.join()
        if not served:
            raise ConfigError(
                f"cannot listen on {listen}; the log above says why: choose another --listen"
            )
        events.say("stopped")
    logging.shutdown()
    sys.stderr.flush()
    sys.stdout.flush()
    # A request to a store that does not answer cannot be called back, and would hold the process.
    os._exit(0)


def _serving(service: Service, specs: list[Any]) -> tuple[str, dict[str, Any]] | None:
    """The event that says where a service answers, once it does."""
    if not service.started:
        return None
    addresses = [
        f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        for host, port in service.addresses
    ]
    # Its sockets are closed at the end, which is no news.
    return ("serving", {"addresses": addresses, "runs": _names(specs)}) if addresses else None


def _names(specs: list[Any]) -> list[str]:
    return [str(spec.name) for spec in specs]


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit():
        msg = f"--listen must be HOST:PORT, such as 127.0.0.1:8080, got {text!r}"
        raise ConfigError(msg)
    return host, int(port)
