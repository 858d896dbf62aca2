"""What an S3 server keeps of its promises: asked by experiment, not by its name or version."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from .retry import response_of
from .s3_create import probe, probe_large
from .s3_session import S3Session


@dataclass(frozen=True, slots=True)
class S3Facts:
    """Answers of one server.

    Attributes:
        exclusive: what is wrong with its conditional PUT, or None if it holds.
        exclusive_multipart: the same of its conditional completion of an upload.
        verifies_checksums: whether it refuses a body that does not have the checksum sent with it.
        clock_ahead_s: seconds by which its clock is ahead of this machine's, within one; None if
            its answers carry no date.
        server: what it calls itself, if it says so.
    """

    exclusive: str | None
    exclusive_multipart: str | None
    verifies_checksums: bool
    clock_ahead_s: float | None
    server: str | None


async def ask(session: S3Session, key: str) -> S3Facts:
    """Try everything out on one key.

    Args:
        session: the bucket.
        key: a key that nobody else uses; deleted again.

    Raises:
        Exception: a request failed for another reason, as it came.
    """
    exclusive = await probe(session, key)
    multipart = exclusive or await probe_large(session, key)
    verifies = await _refuses_wrong_sum(session, key)
    body = b"ckpt doctor"
    answer = await session.send("put_object", {"Key": key, "Body": body, **session.sums(body)})
    await session.send("delete_object", {"Key": key})
    headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    return S3Facts(exclusive, multipart, verifies, _ahead(headers), headers.get("server"))


async def _refuses_wrong_sum(session: S3Session, key: str) -> bool:
    body = b"ckpt doctor"
    wrong = (zlib.crc32(body) ^ 1).to_bytes(4, "big")
    sums = {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": base64.b64encode(wrong).decode("ascii")}
    try:
        await session.once("put_object", {"Key": key, "Body": body, **sums})
    except Exception as error:
        status = (response_of(error) or {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 400:
            return True
        raise  # lost or refused for another reason: that tells nothing of the sum
    await session.send("delete_object", {"Key": key})
    return False


def _ahead(headers: dict[str, Any]) -> float | None:
    try:
        theirs = parsedate_to_datetime(headers["date"])
    except (KeyError, TypeError, ValueError):
        return None
    return (theirs - datetime.now(UTC)).total_seconds()
