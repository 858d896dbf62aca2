"""Requests to one S3 bucket over s3fs's session, each repeated in one place only.

s3fs brings credentials, profiles, endpoints and the event loop. Its own retries, caches and
multipart logic are not used: a hidden repetition would also hide that an answer was lost.
"""

from __future__ import annotations

import asyncio
import base64
import os
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import sync

from ckpt.errors import StorageError

from .base import Buffer
from .retry import RetryPolicy, response_of, retrying
from .traffic import Meter

T = TypeVar("T")

PART_BYTES = 16 * 1024 * 1024
"""Size of a part of an upload or of a parallel read."""
CONCURRENCY = 8
"""Requests in flight of one upload or read."""

_abandoned: list[Any] = []
"""File systems inherited over a fork. They are kept for ever: closing one would wait for the
parent's event loop, which does not run in this process."""


class ShortObject(StorageError):
    """A range that leaves its object."""


class S3Session:
    """One bucket: makes requests, opens connections when first needed and again after a fork.

    Args:
        bucket: its name.
        options: keyword arguments of ``s3fs.S3FileSystem``.
        policy: bounds on repetition.
        checksum: send a CRC32 with every upload.
    """

    def __init__(
        self, bucket: str, options: Mapping[str, Any], policy: RetryPolicy, *, checksum: bool
    ) -> None:
        self.bucket = bucket
        self.policy = policy
        self.meter = Meter()
        self._options = dict(options)
        self._checksum = checksum
        self._lock = threading.Lock()
        self._fs: Any = None
        self._pid = 0

    def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine on the session's event loop and wait for it."""
        result: T = sync(self._filesystem().loop, work)
        return result

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        with self._lock:
            fs, self._fs = self._fs, None
        if fs is not None and self._pid == os.getpid():
            creator = getattr(fs, "_s3creator", None)
            if creator is not None and fs.loop.is_running():
                sync(fs.loop, creator.__aexit__, None, None, None, timeout=5)

    async def send(self, operation: str, parameters: Mapping[str, Any], *, size: int = 0) -> Any:
        """One request that moves ``size`` bytes, repeated as the policy allows."""
        return await retrying(self.policy, size, lambda: self.once(operation, parameters))

    def once(self, operation: str, parameters: Mapping[str, Any]) -> Awaitable[Any]:
        """One request, never repeated."""
        self.meter.add(requests=1, sent=len(parameters.get("Body", b"")))
        call: Awaitable[Any] = self._filesystem()._call_s3(
            operation, Bucket=self.bucket, **parameters
        )
        return call

    async def presign(self, key: str, expires_s: int) -> str:
        """A URL that reads an object, for so many seconds."""
        client = await self._filesystem().get_s3(self.bucket)
        query = {"Bucket": self.bucket, "Key": key}
        url: str = await client.generate_presigned_url(
            "get_object", Params=query, ExpiresIn=expires_s
        )
        return url

    async def pages(self, prefix: str, delimiter: str | None) -> AsyncIterator[dict[str, Any]]:
        """Pages of a listing, in the order of keys."""
        query = {"Prefix": prefix, **({"Delimiter": delimiter} if delimiter else {})}
        while True:
            page = await self.send("list_objects_v2", query)
            yield page
            if not page.get("IsTruncated"):
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    async def repeat(self, size: int, once: Callable[[], Awaitable[T]]) -> T:
        """Anything that moves ``size`` bytes, repeated as the policy allows."""
        return await retrying(self.policy, size, once)

    async def get(self, key: str, span: tuple[int, int] | None = None) -> Buffer:
        """A whole object or its bytes ``[start, end)``; the body is part of what is repeated."""
        size = PART_BYTES if span is None else span[1] - span[0]
        return await self.repeat(size, lambda: self.fetch(key, span))

    async def fetch(self, key: str, span: tuple[int, int] | None) -> Buffer:
        """One read, never repeated."""
        query = {"Key": key}
        if span is not None:
            query["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        answer = await self.once("get_object", query)
        async with answer["Body"] as body:
            data: bytes = await body.read()
        self.meter.add(received=len(data))
        if len(data) != answer["ContentLength"]:
            msg = f"the body has {len(data)} of {answer['ContentLength']} bytes"
            raise ConnectionError(msg)
        return data

    async def get_range(self, key: str, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of an object.

        Raises:
            ShortObject: the object ends before ``end``.
        """
        msg = f"too short: wanted bytes up to {end}"
        if start == end:
            answer = await self.send("head_object", {"Key": key})
            if end > answer["ContentLength"]:
                raise ShortObject(msg)
            return b""
        try:
            data = await self.get(key, (start, end))
        except Exception as error:
            response = response_of(error) or {}
            if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 416:
                raise ShortObject(msg) from None
            raise
        if len(data) != end - start:
            raise ShortObject(msg)
        return data

    async def get_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill ``target``, in parallel ranges when it is long; raises as :meth:`get_range`."""
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(low: int) -> None:
            high = min(low + PART_BYTES, len(target))
            async with gate:
                target[low:high] = await self.get_range(key, start + low, start + high)

        tasks = [asyncio.create_task(one(low)) for low in range(0, max(len(target), 1), PART_BYTES)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            await cancel(tasks)
            raise

    @property
    def algorithm(self) -> dict[str, str]:
        """Parameter that names the checksum of a multipart upload's parts."""
        return {"ChecksumAlgorithm": "CRC32"} if self._checksum else {}

    def sums(self, body: bytes) -> dict[str, str]:
        """Checksum parameters of an upload.

        As a header, computed here: botocore's own default puts it after a chunked body over TLS,
        which older servers refuse (411). The algorithm is named beside the value because some
        servers verify it only then.
        """
        if not self._checksum:
            return {}
        value = base64.b64encode(zlib.crc32(body).to_bytes(4, "big")).decode("ascii")
        return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": value}

    def _filesystem(self) -> Any:
        with self._lock:
            if self._fs is not None and self._pid != os.getpid():
                _abandoned.append(self._fs)
                self._fs = None
            if self._fs is None:
                self._fs = _connect(self._options)
                self._pid = os.getpid()
            return self._fs


async def cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they have ended."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


def _connect(options: Mapping[str, Any]) -> Any:
    """An s3fs instance of our own: no caches, no retries, no checksums but ours."""
    settings = dict(options)
    config = {
        "connect_timeout": 10,
        "read_timeout": 60,
        "max_pool_connections": 4 * CONCURRENCY,
        "request_checksum_calculation": "when_required",
        **settings.pop("config_kwargs", {}),
        "retries": {"total_max_attempts": 1},
    }
    fs = fsspec.filesystem(
        "s3",
        skip_instance_cache=True,
        use_listings_cache=False,
        asynchronous=False,
        config_kwargs=config,
        **settings,
    )
    fs.retries = 1
    return fs
