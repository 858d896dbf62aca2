"""Files over HTTP: conditions, one range, and bytes that were verified before they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Final

from fastapi import Request, Response
from fastapi.responses import RedirectResponse

from ckpt.storage import Presigning, read_checked
from ckpt.types import BLOCK_BYTES, FileRecord

from .answers import http_error
from .metrics import ServiceMetrics
from .roots import ServedRoot
from .streams import ClosingStream

_RANGE: Final = re.compile(r"bytes=(?:([0-9]{1,18})-([0-9]{0,18})|-([0-9]{1,18}))")
_ETAGS: Final = re.compile(r'(?:W/)?"[^"]*"|\*')
KIND: Final = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Download:
    """A file to send.

    Attributes:
        path: relative to the root.
        size: in bytes.
        etag: SHA-256 (hex) of all of it, or None if that is not known.
        record: its checksums, with which every block is compared before it is sent, or None.
        immutable: it will never hold other bytes.
    """

    path: str
    size: int
    etag: str | None = None
    record: FileRecord | None = None
    immutable: bool = False


def span_of(header: str | None, size: int) -> tuple[int, int] | None:
    """Bytes ``[start, end)`` that a ``Range`` header asks for, or None for the whole file.

    Several ranges and other units are passed over, as the rules of HTTP allow.

    Raises:
        ValueError: there are no such bytes.
    """
    match = None if header is None else _RANGE.fullmatch(header.strip())
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        count = min(int(suffix), size)
        if not count:
            raise ValueError(header)
        return size - count, size
    start, end = int(first), min(int(last) + 1, size) if last else size
    if last and int(last) < start:
        return None
    if start >= size:
        raise ValueError(header)
    return start, end


def matches(header: str | None, etag: str | None) -> bool:
    """Whether one of the tags of an ``If-None-Match`` is the file's."""
    if header is None or etag is None:
        return False
    tags = _ETAGS.findall(header)
    return "*" in tags or etag in (tag.removeprefix("W/") for tag in tags)


async def send(
    request: Request, root: ServedRoot, file: Download, *, redirect: bool = False
) -> Response:
    """The answer to a GET or HEAD of a file.

    Args:
        request: with its conditions and range.
        root: where it lies.
        file: which.
        redirect: to a signed URL of the store, if the service and the store allow it.

    Raises:
        Busy: too many downloads are under way.
    """
    config = request.app.state.config
    tag = None if file.etag is None else f'"{file.etag}"'
    headers = {"Accept-Ranges": "bytes"}
    if tag is not None:
        headers["ETag"] = tag
    if file.immutable:
        headers["Cache-Control"] = "private, max-age=31536000, immutable"
    if matches(request.headers.get("if-none-match"), tag):
        return Response(status_code=304, headers=headers)
    if redirect and config.presign and isinstance(root.storage, Presigning):
        url = await root.call(root.storage.presigned_url, file.path, config.presign_s)
        return RedirectResponse(url, 307, headers={"Cache-Control": "no-store"})
    condition = request.headers.get("if-range")
    asked = request.headers.get("range") if condition in (None, tag) else None
    try:
        span = span_of(asked, file.size)
    except ValueError:
        none = {**headers, "Content-Range": f"bytes */{file.size}"}
        return http_error(416, f"the file has {file.size} bytes", none)
    start, end = span or (0, file.size)
    headers["Content-Length"] = str(end - start)
    if span is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    status = 200 if span is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=KIND)
    held = contextlib.ExitStack()
    held.enter_context(request.app.state.downloads.one())
    pieces = _pieces(root, file, start, end, request.app.state.metrics)
    return ClosingStream(pieces, status, headers, KIND, held)


async def _pieces(
    root: ServedRoot,
    file: Download,
    start: int,
    end: int,
    metrics: ServiceMetrics,
) -> AsyncGenerator[bytes, None]:
    """The bytes in pieces that end with a block; the next one is read while one is sent."""
    ends = [*range(start - start % BLOCK_BYTES + BLOCK_BYTES, end, BLOCK_BYTES), end]
    spans = list(zip([start, *ends], ends, strict=False))
    reading: asyncio.Task[bytes] | None = None
    try:
        for index, span in enumerate(spans):
            if reading is None:
                reading = asyncio.create_task(root.call(_reader(root, file, *span)))
            data = await reading
            reading = None
            if index + 1 < len(spans):
                reading = asyncio.create_task(root.call(_reader(root, file, *spans[index + 1])))
            metrics.sent_bytes.labels(root.name).inc(len(data))
            yield data
    finally:
        if reading is not None:
            reading.cancel()


def _reader(root: ServedRoot, file: Download, start: int, end: int) -> Callable[[], bytes]:
    def read() -> bytes:
        if file.record is None:
            return root.storage.read(file.path, start, end)
        return read_checked(root.storage, file.path, file.record, start, end)

    return read


def sha256_of(root: ServedRoot, path: str) -> tuple[int, str]:
    """Size and SHA-256 of a small file."""
    data = root.storage.read(path)
    return len(data), hashlib.sha256(data).hexdigest()
