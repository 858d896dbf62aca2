"""Uploads to S3: one PUT, or a multipart upload that is completed or aborted, nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ckpt.errors import StorageError

from .base import ONE_PUT_BYTES
from .faultpoints import hit
from .retry import fate_of
from .s3_session import CONCURRENCY, PART_BYTES, S3Session, cancel

SINGLE_PUT_BYTES = ONE_PUT_BYTES
"""Up to here an object is one request; above, a multipart upload."""
MAX_PARTS = 10_000


class LyingServer(StorageError):
    """A success that was none."""


async def put_object(session: S3Session, key: str, body: bytes) -> None:
    """Write an object in one request."""
    query = {"Key": key, "Body": body, **session.sums(body)}
    await session.send("put_object", query, size=len(body))


async def multipart(session: S3Session, key: str, views: Iterable[memoryview], size: int) -> None:
    """Write an object in parts, a few at a time; aborted on any error, so that nothing shows."""
    upload = await begin(session, key)
    try:
        done = await upload_parts(session, upload, cut(views, part_bytes(size)))
        hit("object.multipart.before_complete")
        await _complete(session, upload, done, size)
        hit("object.multipart.after_complete")
    except BaseException as error:
        await abandon(session, upload, error)
        raise


async def begin(session: S3Session, key: str) -> dict[str, str]:
    """Begin a multipart upload; what names it in later requests."""
    answer = await session.send("create_multipart_upload", {"Key": key, **session.algorithm})
    return {"Key": key, "UploadId": answer["UploadId"]}


async def abandon(session: S3Session, upload: Mapping[str, str], error: BaseException) -> None:
    """Abort an upload because of an error, which gets a note if that fails too."""
    try:
        await session.send("abort_multipart_upload", upload)
    except Exception as unaborted:  # noqa: BLE001 - the first error is the one to report
        error.add_note(f"aborting the upload failed too: {type(unaborted).__name__}")


async def upload_parts(
    session: S3Session, upload: Mapping[str, str], parts: Iterator[bytes]
) -> list[dict[str, Any]]:
    """Send parts as they are made, at most ``CONCURRENCY`` of them held in memory."""

    async def one(number: int, body: bytes) -> dict[str, Any]:
        sums = session.sums(body)
        query = {"PartNumber": number, "Body": body, **upload, **sums}
        answer = await session.send("upload_part", query, size=len(body))
        sums.pop("ChecksumAlgorithm", None)
        return {"PartNumber": number, "ETag": answer["ETag"], **sums}

    running: set[asyncio.Task[dict[str, Any]]] = set()
    done: list[dict[str, Any]] = []
    number = 0
    try:
        # The caller's iterable may compute or read: not on the loop that others share.
        while (body := await asyncio.to_thread(next, parts, None)) is not None:
            number += 1
            running.add(asyncio.create_task(one(number, body)))
            hit("object.multipart.mid")
            if len(running) >= CONCURRENCY:
                ready, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                done += [task.result() for task in ready]
        done += await asyncio.gather(*running)
    except BaseException:
        await cancel(running)
        raise
    return sorted(done, key=lambda part: int(part["PartNumber"]))


async def _complete(
    session: S3Session, upload: Mapping[str, str], parts: Sequence[Mapping[str, Any]], size: int
) -> None:
    """Complete an upload; the object itself tells whether it is.

    Where the answer was lost, a second "complete" fails on many servers: the upload is gone. And
    a server that answers at once and assembles later may have said yes and failed after it.
    """
    query = {"MultipartUpload": {"Parts": parts}, **upload}
    try:
        await session.send("complete_multipart_upload", query)
    except Exception as error:  # noqa: BLE001 - confirm raises it unless the object is there
        await confirm(session, upload["Key"], size, len(parts), error)
    else:
        await confirm(session, upload["Key"], size, len(parts))


async def confirm(
    session: S3Session, key: str, size: int, parts: int, error: Exception | None = None
) -> None:
    """Make sure that a completed upload is there.

    Raises:
        Exception: it is not: ``error``, or that the server's yes was wrong.
    """
    if await _is_there(session, key, size, parts):
        return
    if error is not None:
        raise error
    msg = "the server said that the upload is complete, but the object is not there"
    raise LyingServer(msg)


async def _is_there(session: S3Session, key: str, size: int, parts: int) -> bool:
    """Whether an object of this size, made of that many parts, lies at the key."""
    try:
        found = await session.send("head_object", {"Key": key})
    except Exception as error:
        if fate_of(error).final:
            return False
        raise
    # A multipart object's ETag ends with the number of its parts.
    etag = str(found.get("ETag", "")).strip('"')
    return found["ContentLength"] == size and etag.endswith(f"-{parts}")


def part_bytes(size: int) -> int:
    """Size of a part: the usual one, or as large as the limit on their number demands."""
    if size <= PART_BYTES * MAX_PARTS:
        return PART_BYTES
    mebibytes = -(-size // (MAX_PARTS * 2**20))
    return mebibytes * 2**20


def cut(views: Iterable[memoryview], part: int) -> Iterator[bytes]:
    """Cut a stream of views into byte strings of ``part`` bytes; the last one may be shorter."""
    held = bytearray()  # copied, because a stream's buffer may be reused for the next chunk
    for view in views:
        rest = view
        while len(held) + len(rest) >= part:
            take = part - len(held)
            yield b"".join((held, rest[:take]))
            held, rest = bytearray(), rest[take:]
        held += rest
    if held:
        yield bytes(held)
