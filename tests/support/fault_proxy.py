"""Spoils the answers of a real S3 server: a proxy on loopback that forwards what it lets pass.

The requests pass as they are, ``Host`` included, so that their signatures hold.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from urllib.parse import urlsplit

from support.fake_s3 import FakeS3, _Handler

_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
SECONDS = 60


@dataclass
class FaultProxy(FakeS3):
    """What goes wrong (``spoils``) and what happened (``log``) between client and server.

    Attributes:
        upstream: the server's address.
        remove: deletes an object behind the client's back; what the spoil ``lie`` needs.
    """

    upstream: str = ""
    remove: Callable[[str], object] | None = None

    def lose(self, key: str) -> None:
        assert self.remove is not None
        self.remove(key)

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.upstream)
        assert parts.hostname is not None
        if parts.scheme == "https":  # trusts what the AWS variables do
            return http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=SECONDS, context=_trusting()
            )
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=SECONDS)


class _Forwarder(_Handler):
    fake: FaultProxy

    def perform(self, key: str, query: str, head: dict[str, str], body: bytes):
        connection = self.fake.connect()
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            headers = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in _HOP_BY_HOP
            }
        finally:
            connection.close()
        length = next((v for n, v in headers.items() if n.lower() == "content-length"), None)
        headers = {n: v for n, v in headers.items() if n.lower() != "content-length"}
        headers["Content-Length"] = length if self.command == "HEAD" and length else str(len(data))
        return answer.status, data, headers


def _trusting() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """A proxy before a server, for the length of the block."""
    proxy = FaultProxy(upstream=upstream)
    handler = type("Handler", (_Forwarder,), {"fake": proxy})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        thread.join(timeout=30)
        server.server_close()
