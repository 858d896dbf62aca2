"""A small S3 server whose answers a test can spoil: lost, late, wrong or unlike AWS's."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape, unescape


@dataclass
class Spoil:
    """One thing that goes wrong with matching requests.

    Attributes:
        method: HTTP method, e.g. ``"PUT"``.
        how: ``status`` (answer ``code`` instead of doing it), ``status-after`` (do it, then answer
            ``code``), ``drop`` (close the connection instead), ``drop-after`` (do it, then
            close), ``truncate`` (half of the body), ``flip`` (one bit of the body), ``lie`` (say
            that it is done, and lose it), ``reset`` (break the connection in the middle of the
            body, the request's or the answer's), ``hang`` (answer after ``seconds``).
        code: HTTP status and S3 error code of the answer.
        times: how many requests it meets.
        skip: how many matching requests pass first.
        key: text that the key must contain.
        query: text that the query must contain.
        before: called first, e.g. to let somebody else write.
    """

    method: str
    how: str
    code: tuple[int, str] = (500, "InternalError")
    times: int = 1
    skip: int = 0
    key: str = ""
    query: str = ""
    seconds: float = 0.0
    message: str = "spoilt"
    before: Callable[[], object] | None = None


@dataclass
class FakeS3:
    """What lies in the bucket ``bucket`` and what happened.

    Attributes:
        url: endpoint.
        objects: key → bytes.
        uploads: unfinished multipart uploads, id → {part number: bytes}.
        begun: key and start (seconds since the epoch) of every upload, by id.
        spoils: what goes wrong; used up as it happens.
        log: (method, key, query, headers) of every request.
        conditions: keep ``If-None-Match`` on PUT.
        multipart_conditions: keep it on the completion of a multipart upload.
        checksums: refuse a body that does not have the CRC32 sent with it.
        headers: sent with every answer.
    """

    url: str = ""
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    begun: dict[str, tuple[str, float]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    spoils: list[Spoil] = field(default_factory=list)
    log: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)
    conditions: bool = True
    multipart_conditions: bool = True
    checksums: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def requests(self, method: str, query: str = "") -> list[dict[str, str]]:
        """Headers of the requests of one method whose query contains a text."""
        return [head for m, _key, q, head in self.log if m == method and query in q]

    def lose(self, key: str) -> None:
        """Forget an object, as a lying server does."""
        self.objects.pop(key, None)

    def due(self, method: str, key: str, query: str) -> Spoil | None:
        with self.lock:
            for spoil in self.spoils:
                if method != spoil.method or spoil.key not in key or spoil.query not in query:
                    continue
                if spoil.skip > 0:
                    spoil.skip -= 1
                elif spoil.times > 0:
                    spoil.times -= 1
                    return spoil
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: FakeS3

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def handle_any(self) -> None:
        parts = urlsplit(self.path)
        _bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        spoil = self.fake.due(self.command, key, parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        broken = spoil is not None and spoil.how == "reset"
        body = self.rfile.read(length // 2 if broken else length)
        head = {name.lower(): value for name, value in self.headers.items()}
        self.fake.log.append((self.command, key, parts.query, head))
        if spoil is None:
            self.answer(*self.perform(key, parts.query, head, body))
            return
        if spoil.before:
            spoil.before()
        if broken:
            if not length:
                self.answer(*self.perform(key, parts.query, head, body), cut=True)
            self.reset()
            return
        if spoil.how == "hang":
            time.sleep(spoil.seconds)
        result = None
        if spoil.how in {"status-after", "drop-after", "truncate", "flip", "lie"}:
            result = self.perform(key, parts.query, head, body)
        if spoil.how.startswith("drop"):
            self.close_connection = True
        elif spoil.how == "truncate" and result is not None:
            self.answer(*result, cut=True)
        elif spoil.how == "flip" and result is not None:
            status, data, *more = result
            at = len(data) // 2
            self.answer(status, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], *more)
        elif spoil.how == "lie" and result is not None:
            self.fake.lose(key)
            self.answer(*result)
        else:
            self.answer(*_error(*spoil.code, spoil.message))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        os.close(self.connection.detach())

    def answer(self, status: int, body: bytes, *more: dict[str, str], cut: bool = False) -> None:
        self.send_response(status)
        extra = more[0] if more else {}
        length = extra.pop("Content-Length", str(len(body)))
        for name, value in {**self.fake.headers, **extra, "Content-Length": length}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True

    def perform(self, key: str, query: str, head: dict[str, str], body: bytes):
        fake, asked = self.fake, parse_qs(query, keep_blank_values=True)
        with fake.lock:
            if self.command == "GET" and "uploads" in asked:
                return _uploads(fake, asked)
            if self.command in {"GET", "HEAD"} and "list-type" in asked:
                delimiter = asked.get("delimiter", [""])[0]
                return _listing(fake, asked["prefix"][0], delimiter)
            if self.command in {"GET", "HEAD"}:
                return _read(fake, key, head)
            if self.command == "DELETE":
                if "uploadId" in asked:
                    fake.uploads.pop(asked["uploadId"][0], None)
                else:
                    fake.objects.pop(key, None)
                return 204, b""
            if "delete" in asked:
                for gone in re.findall(r"<Key>(.*?)</Key>", body.decode()):
                    fake.objects.pop(unescape(gone), None)
                return 200, _xml("DeleteResult", "")
            claimed = head.get("x-amz-checksum-crc32")
            if fake.checksums and claimed and claimed != _crc(body):
                return _error(400, "BadDigest")
            if "uploads" in asked:
                name = f"upload-{len(fake.uploads)}-{time.monotonic_ns()}"
                fake.uploads[name] = {}
                fake.begun[name] = (key, time.time())
                return 200, _xml("InitiateMultipartUploadResult", f"<UploadId>{name}</UploadId>")
            if "uploadId" in asked:
                return self._multipart(key, asked, head, body)
            if fake.conditions and head.get("if-none-match") == "*" and key in fake.objects:
                # Without <Condition>, as servers other than AWS answer.
                return _error(412, "PreconditionFailed")
            fake.objects[key] = body
            fake.etags[key] = "whole"
            return 200, b"", {"ETag": '"whole"'}

    def _multipart(self, key: str, asked: dict[str, list[str]], head: dict[str, str], body: bytes):
        fake, name = self.fake, asked["uploadId"][0]
        if name not in fake.uploads:
            return _error(404, "NoSuchUpload")
        if self.command == "PUT":
            fake.uploads[name][int(asked["partNumber"][0])] = body
            return 200, b"", {"ETag": '"part"'}
        if fake.multipart_conditions and head.get("if-none-match") == "*" and key in fake.objects:
            return _error(412, "PreconditionFailed")
        parts = fake.uploads.pop(name)
        fake.objects[key] = b"".join(parts[number] for number in sorted(parts))
        fake.etags[key] = f"all-{len(parts)}"
        return 200, _xml("CompleteMultipartUploadResult", f"<ETag>{fake.etags[key]}</ETag>")


def _crc(body: bytes) -> str:
    return base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode()


def _xml(tag: str, inner: str) -> bytes:
    return f'<?xml version="1.0" encoding="UTF-8"?><{tag}>{inner}</{tag}>'.encode()


def _error(status: int, code: str, message: str = "no"):
    return status, _xml("Error", f"<Code>{code}</Code><Message>{message}</Message>")


def _read(fake: FakeS3, key: str, head: dict[str, str]):
    if key not in fake.objects:
        return _error(404, "NoSuchKey")
    data = fake.objects[key]
    extra = {"ETag": f'"{fake.etags.get(key, "whole")}"'}
    if "range" not in head:
        return 200, data, {**extra, "Content-Length": str(len(data))}
    low, high = head["range"].removeprefix("bytes=").split("-")
    if int(low) >= len(data):
        return _error(416, "InvalidRange")
    part = data[int(low) : int(high) + 1]
    span = f"bytes {low}-{int(low) + len(part) - 1}/{len(data)}"
    return 206, part, {**extra, "Content-Range": span}


def _listing(fake: FakeS3, prefix: str, delimiter: str):
    items, folders = "", set()
    for key, data in sorted(fake.objects.items()):
        if not key.startswith(prefix):
            continue
        first, cut, _rest = key.removeprefix(prefix).partition(delimiter or "\0")
        if cut:
            folders.add(prefix + first + cut)
        else:
            items += f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size></Contents>"
    for folder in sorted(folders):
        items += f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
    return 200, _xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{items}")


def _uploads(fake: FakeS3, asked: dict[str, list[str]]):
    """Two uploads a page, whatever their prefix, as if the filter were not known."""
    after = asked.get("upload-id-marker", [""])[0]
    names = [name for name in sorted(fake.uploads) if name > after]
    page = names[:2]
    items = "".join(
        f"<Upload><Key>{fake.begun[name][0]}</Key><UploadId>{name}</UploadId><Initiated>"
        f"{datetime.fromtimestamp(fake.begun[name][1], UTC):%Y-%m-%dT%H:%M:%S.000Z}"
        "</Initiated></Upload>"
        for name in page
    )
    more = ""
    if len(names) > len(page):
        more = (
            f"<NextKeyMarker>{fake.begun[page[-1]][0]}</NextKeyMarker>"
            f"<NextUploadIdMarker>{page[-1]}</NextUploadIdMarker>"
        )
    flag = "true" if more else "false"
    return 200, _xml(
        "ListMultipartUploadsResult", f"<IsTruncated>{flag}</IsTruncated>{more}{items}"
    )


@contextlib.contextmanager
def fake_s3(tls: ssl.SSLContext | None = None) -> Iterator[FakeS3]:
    """A server on loopback for the length of the block."""
    fake = FakeS3()
    handler = type("Handler", (_Handler,), {"fake": fake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    fake.url = f"{'https' if tls else 'http'}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join(timeout=30)
        server.server_close()
