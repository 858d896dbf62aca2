"""The sidecar's window: ``/healthz``, ``/readyz`` and ``/metrics`` over HTTP.

It only ever answers GET and HEAD of these three paths, reads a bounded number of bytes in a bounded
time, serves a bounded number of callers at once, and closes each connection after one answer.
"""

from __future__ import annotations

import hashlib
import hmac
import http
import ipaddress
import json
import logging
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, Final, Protocol

from ckpt.errors import ConfigError

MAX_REQUEST_BYTES: Final = 8 * 1024
"""Request line and headers together."""
REQUEST_SECONDS: Final = 5.0
"""For a whole request, and again for the whole answer."""
MAX_CALLERS: Final = 16
MIN_TOKEN: Final = 16
_MAX_TOKEN: Final = 4096
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})

log = logging.getLogger(__name__)


class Window(Protocol):
    """What is shown."""

    def health(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether the process works, and why not."""
        ...

    def readiness(self) -> tuple[bool, Mapping[str, Any]]:
        """Whether the engines serve a proven version, and what they serve."""
        ...

    def metrics(self) -> str:
        """Prometheus' text format."""
        ...


@dataclass(frozen=True, slots=True)
class Listen:
    """Where to listen, checked.

    Attributes:
        host: an IP address or ``localhost``.
        port: 0 lets the system choose.
        token: what callers must show, or None on loopback.
    """

    host: str
    port: int
    token: str | None = None

    @classmethod
    def parse(cls, text: str, token: str | None) -> Listen:
        """From ``HOST:PORT``; an IPv6 address stands in brackets.

        Raises:
            ConfigError: not an address and port, or other machines could reach it without a token.
        """
        host, colon, port = text.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
            msg = f"--listen must be HOST:PORT, such as 127.0.0.1:9101, got {text!r}"
            raise ConfigError(msg)
        loopback = _is_loopback(host)
        if token is None and not loopback:
            msg = (
                f"{host} can be reached from other machines: listen on 127.0.0.1, or give a token "
                "that callers must show (--token-file)"
            )
            raise ConfigError(msg)
        return cls(host, int(port), token)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        msg = f"--listen takes an IP address or localhost, got {host!r}"
        raise ConfigError(msg) from error


def read_token(path: Path) -> str:
    """The token in a file: one line of printable ASCII without spaces.

    Raises:
        ConfigError: no such file, or a token that is too short to keep anybody out.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TOKEN + 1)
    except OSError as error:
        msg = f"cannot read the token in {path}: {error.strerror}"
        raise ConfigError(msg) from error
    text = data.decode("latin-1").strip()
    plain = text.isascii() and text.isprintable() and " " not in text
    if not plain or not MIN_TOKEN <= len(text) <= _MAX_TOKEN:
        msg = (
            f"the token in {path} must be {MIN_TOKEN} to {_MAX_TOKEN} printable characters without "
            "spaces"
        )
        raise ConfigError(msg)
    return text


class SyncServer:
    """The HTTP server, in threads of its own.

    Args:
        listen: where.
        window: what is shown.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, listen: Listen, window: Window) -> None:
        try:
            self._server = _Server(listen, window)
        except OSError as error:
            msg = f"cannot listen on {listen.host}:{listen.port}: {error.strerror or error}"
            raise ConfigError(msg) from error
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="ckpt-http",
            daemon=True,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, as the system assigned them."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 2 * MAX_CALLERS

    def __init__(self, listen: Listen, window: Window) -> None:
        self.address_family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        self.window = window
        self.token_digest = None if listen.token is None else _digest(listen.token.encode())
        self.slots = threading.BoundedSemaphore(MAX_CALLERS)
        super().__init__((listen.host, listen.port), _Handler)

    def server_bind(self) -> None:
        # Not that of HTTPServer: it asks the resolver for this machine's name, and may wait long.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that went away is no event; what goes wrong inside is logged where it does."""
        log.debug("the connection of a caller failed: %r", sys.exception())


class _Handler(BaseHTTPRequestHandler):
    """One request, one answer."""

    server: _Server
    server_version = "ckpt"
    sys_version = ""
    protocol_version = "HTTP/1.0"

    def setup(self) -> None:
        super().setup()
        # The whole request is read here, within its bounds; the parser then works on memory.
        self.rfile.close()
        self.rfile = BytesIO(_read_head(self.connection))
        self.connection.settimeout(REQUEST_SECONDS)

    def do_GET(self) -> None:
        """Answer one of the three paths."""
        refused = self._refusal()
        if refused is not None:
            self._answer(refused, "text/plain; charset=utf-8", refused.phrase + "\n")
        elif self.path == "/metrics":
            text = self.server.window.metrics()
            self._answer(http.HTTPStatus.OK, "text/plain; version=0.0.4; charset=utf-8", text)
        elif self.path in {"/healthz", "/readyz"}:
            window = self.server.window
            fine, why = window.health() if self.path == "/healthz" else window.readiness()
            status = http.HTTPStatus.OK if fine else http.HTTPStatus.SERVICE_UNAVAILABLE
            self._answer(status, "application/json", json.dumps(why) + "\n")
        else:
            found = http.HTTPStatus.NOT_FOUND
            self._answer(found, "text/plain; charset=utf-8", "/healthz, /readyz or /metrics\n")

    do_HEAD = do_GET

    def _refusal(self) -> http.HTTPStatus | None:
        digest = self.server.token_digest
        if digest is None:
            # A page in a browser on this machine reaches loopback too, but under its own name.
            name = _host_of(self.headers.get("Host", "localhost"))
            return None if name in _LOCAL_NAMES else http.HTTPStatus.FORBIDDEN
        scheme, _, shown = self.headers.get("Authorization", "").partition(" ")
        # Digests have one length, and comparing them takes as long whatever is shown.
        right = hmac.compare_digest(_digest(shown.strip().encode("latin-1", "replace")), digest)
        fine = right and scheme.lower() == "bearer"
        return None if fine else http.HTTPStatus.UNAUTHORIZED

    def _answer(self, status: http.HTTPStatus, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status is http.HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are logged at debug level, with what a caller sent escaped."""
        log.debug("%s: %s", self.address_string(), ascii(format % args))


def _host_of(header: str) -> str:
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _read_head(connection: socket.socket) -> bytes:
    """Bytes up to the blank line; nothing if they do not come in time or are too many."""
    deadline = time.monotonic() + REQUEST_SECONDS
    data = bytearray()
    while b"\r\n\r\n" not in data and b"\n\n" not in data:
        left = deadline - time.monotonic()
        if left <= 0 or len(data) > MAX_REQUEST_BYTES:
            return b""
        connection.settimeout(left)
        try:
            piece = connection.recv(MAX_REQUEST_BYTES + 1 - len(data))
        except OSError:  # it took too long, or went away: nobody is there to be told
            return b""
        if not piece:
            return b""
        data += piece
    return bytes(data)
