"""What a service is told: roots, address, tokens and bounds; checked once."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ckpt.errors import ConfigError
from ckpt.layout import check_name
from ckpt.peft import local_directory

from .auth import TokenSet

_NOT_IN_NAMES: Final = re.compile(r"[^A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class RootSpec:
    """A root to serve.

    Attributes:
        name: its name in paths of the API.
        url: a directory or URL.
        storage_options: for its store.
    """

    name: str
    url: str
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, storage_options: Mapping[str, Any] | None = None) -> RootSpec:
        """From ``URL`` or ``NAME=URL``; without a name, the last part of the URL is it.

        Raises:
            ConfigError: no URL, or a name that is not one.
        """
        name, equals, url = text.partition("=")
        if not equals or "/" in name or ":" in name:
            url = text
            last = str(local_directory(url) or url).rstrip("/").rpartition("/")[2]
            name = _NOT_IN_NAMES.sub("-", last).strip("-_")
        if not url:
            msg = f"--root takes URL or NAME=URL, got {text!r}"
            raise ConfigError(msg)
        return cls(check_name("the name of a root", name), url, storage_options)


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on what callers may cost.

    Attributes:
        path_chars: length of path and query together.
        head_bytes: of a request's head.
        body_bytes: of a request's body.
        head_s: seconds for the whole head of a request to arrive.
        body_s: seconds for the whole body.
        send_s: seconds that a caller may take to accept a piece of the answer.
        per_second: requests of one caller (a token, or an address) in the long run.
        burst: requests that it may send at once after a rest.
        connections: of all callers together.
        waiting: long polls and event streams together.
        downloads: at one time; each holds a block of 8 MiB.
        store_s: seconds that a store may take before a caller is told to try again.
        wait_s: longest long poll.
        page: longest page of a listing.
    """

    path_chars: int = 4096
    head_bytes: int = 32 * 1024
    body_bytes: int = 256 * 1024
    head_s: float = 10.0
    body_s: float = 20.0
    send_s: float = 60.0
    per_second: float = 500.0
    burst: int = 2000
    connections: int = 2000
    waiting: int = 1500
    downloads: int = 32
    store_s: float = 60.0
    wait_s: float = 60.0
    page: int = 1000


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """All that a service is told.

    Attributes:
        roots: what is served; names are unique.
        host: an IP address or ``localhost``.
        port: 0 lets the system choose.
        tokens: what callers must show; empty only on loopback.
        limits: bounds.
        presign: whether downloads from S3 may be redirected to signed URLs.
        presign_s: how long such a URL is good.
        job_workers: jobs that run at one time.
        job_timeout_s: without a sign of life for so long, a job's service counts as dead.
        poll_s: seconds between two looks at a root while somebody waits; by default 0.005 on
            a file system and 0.25 elsewhere.
        drain_s: seconds that callers get to end when the service is asked to stop.
        allowed_hosts: names in the ``Host`` header that are answered without tokens, beside
            those of loopback.
    """

    roots: Sequence[RootSpec]
    host: str = "127.0.0.1"
    port: int = 8080
    tokens: TokenSet = field(default_factory=TokenSet, repr=False)
    limits: Limits = field(default_factory=Limits)
    presign: bool = False
    presign_s: int = 300
    job_workers: int = 2
    job_timeout_s: float = 30.0
    poll_s: float | None = None
    drain_s: float = 10.0
    allowed_hosts: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Refuse what cannot work or would not be safe.

        Raises:
            ConfigError: says which setting.
        """
        names = [spec.name for spec in self.roots]
        if not names:
            raise ConfigError("name a root: --root URL")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"two roots are called {twice[0]!r}; write --root NAME=URL to tell them apart"
            raise ConfigError(msg)
        if not 0 <= self.port <= 65535:
            msg = f"the port must be from 0 to 65535, got {self.port}"
            raise ConfigError(msg)
        if not is_loopback(self.host) and not self.tokens:
            msg = (
                f"{self.host} can be reached from other machines: listen on 127.0.0.1, or give "
                "tokens that callers must show (--token-file)"
            )
            raise ConfigError(msg)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        ConfigError: neither an IP address nor ``localhost``.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        msg = f"the address to listen on must be an IP address or localhost, got {host!r}"
        raise ConfigError(msg) from error
