"""A service over real sockets, in a thread of the test's process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from ckpt.service import Limits, RootSpec, ServiceConfig
from ckpt.service.auth import TokenSet
from ckpt.service.server import Service

READ, LEASE, ADMIN = ("reader-0123456789", "lessee-0123456789", "keeper-0123456789")
TOKEN_LINES = f"# of the tests\nread {READ} fleet\nlease {LEASE} sidecar\nadmin {ADMIN} operator\n"


def tokens(directory: Path) -> TokenSet:
    """One token of each scope, read from a file."""
    path = directory / "tokens.txt"
    path.write_text(TOKEN_LINES)
    return TokenSet.read(path)


def as_(token: str) -> dict[str, str]:
    """The header that shows a token."""
    return {"Authorization": f"Bearer {token}"}


@contextmanager
def serving(
    *roots: str | Path,
    options: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    port: int = 0,
    **settings: Any,
) -> Iterator[httpx.Client]:
    """A client of a service over the roots (``NAME=URL`` or a path), which ends with the block."""
    specs = [RootSpec.parse(str(root), options) for root in roots]
    config = ServiceConfig(specs, port=port, limits=limits or Limits(), drain_s=2.0, **settings)
    service = Service(config)
    thread = threading.Thread(target=service.run, name="service")
    thread.start()
    deadline = time.monotonic() + 20
    while not service.started and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.005)
    try:
        host, port = service.addresses[0]
        with httpx.Client(base_url=f"http://{host}:{port}", timeout=20) as client:
            yield client
    finally:
        service.stop()
        thread.join(30)
        assert not thread.is_alive()
