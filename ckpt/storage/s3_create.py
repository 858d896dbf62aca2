"""Exclusive create on S3 by ``If-None-Match: *``, and the proof that a store keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .faultpoints import hit
from .retry import Fate, fate_of, response_of
from .s3_session import S3Session
from .s3_upload import abandon, begin, cut, part_bytes, upload_parts

_BEST_EFFORT_HEADERS = ("x-trans-id", "x-openstack-request-id")
"""Answers of OpenStack Swift, whose conditional PUT is documented as best effort."""


@dataclass(frozen=True, slots=True)
class Unsettled:
    """A conditional create whose outcome only the object itself can tell."""

    error: Exception


async def create(session: S3Session, key: str, body: bytes) -> Unsettled | None:
    """Conditional PUT of one object.

    Not repeated blindly: after a lost answer a refusal may be the echo of our own success, so
    the caller is told that the outcome is to be settled by reading back. That holds for a plain
    refusal too: the HTTP client below repeats a PUT once by itself when the server has closed
    the connection it was sent over.

    Returns:
        None if the server said yes, else the refusal or the last lost answer.

    Raises:
        Exception: the request failed for certain, as it came.
    """
    query = {"Key": key, "Body": body, "IfNoneMatch": "*", **session.sums(body)}
    policy = session.policy
    doubt: Exception | None = None
    hit("object.put_new.before")
    for attempt in range(policy.attempts):
        try:
            await asyncio.wait_for(session.once("put_object", query), policy.limit(len(body)))
        except Exception as error:
            fate = fate_of(error)
            if fate is Fate.TAKEN:
                return Unsettled(error)
            if fate is Fate.UNKNOWN:
                doubt = error
            elif doubt is None and (fate.final or attempt + 1 == policy.attempts):
                raise
        else:
            hit("object.put_new.after")
            return None
        await asyncio.sleep(policy.pause(attempt))
    return Unsettled(doubt or TimeoutError("no answer"))


async def create_large(session: S3Session, key: str, body: bytes) -> Unsettled | None:
    """Conditional completion of a multipart upload; the outcomes are those of :func:`create`.

    After a conflict the whole upload is made anew, as S3 demands. An upload whose fate is open is
    aborted: what the object then is, it stays.
    """
    policy = session.policy
    hit("object.put_new.before")
    for attempt in range(policy.attempts):
        upload = await begin(session, key)
        try:
            source = cut([memoryview(body)], part_bytes(len(body)))
            parts = await upload_parts(session, upload, source)
        except BaseException as error:
            await abandon(session, upload, error)
            raise
        problem = await _complete_new(session, upload, parts)
        if problem is None:
            hit("object.put_new.after")
            return None
        await abandon(session, upload, problem)
        fate = fate_of(problem)
        if fate in {Fate.TAKEN, Fate.UNKNOWN}:
            return Unsettled(problem)
        if fate is not Fate.CONFLICT or attempt + 1 == policy.attempts:
            raise problem
        await asyncio.sleep(policy.pause(attempt))
    return Unsettled(TimeoutError("no answer"))


async def _complete_new(
    session: S3Session, upload: Mapping[str, str], parts: Sequence[Mapping[str, Any]]
) -> Exception | None:
    """Complete an upload on the condition that its key is free; None if the server said yes.

    Once an answer was lost, any refusal may be the echo of our own success: the lost answer is
    what is returned then.
    """
    query = {"MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*", **upload}
    policy = session.policy
    doubt: Exception | None = None
    for attempt in range(policy.attempts):
        try:
            await asyncio.wait_for(
                session.once("complete_multipart_upload", query), policy.limit(0)
            )
        except Exception as error:  # noqa: BLE001 - classified here, raised by the caller
            fate = fate_of(error)
            if fate in {Fate.UNKNOWN, Fate.NOT_SENT}:
                doubt = error if doubt is None or fate is Fate.UNKNOWN else doubt
            else:
                return doubt or error
        else:
            return None
        await asyncio.sleep(policy.pause(attempt))
    return doubt


async def probe_large(session: S3Session, key: str) -> str | None:
    """What is wrong with the store's conditional completion of uploads, or None if it holds.

    Servers may keep the condition on a PUT and silently ignore it here, and then overwrite.
    """
    await session.send("put_object", {"Key": key, "Body": b"1", **session.sums(b"1")})
    upload = await begin(session, key)
    try:
        parts = await upload_parts(session, upload, iter([b"2"]))
        refusal = await _complete_new(session, upload, parts)
    except BaseException as error:
        await abandon(session, upload, error)
        raise
    finally:
        await session.send("delete_object", {"Key": key})
    if refusal is None:
        return "ignores 'If-None-Match' on multipart uploads"
    await abandon(session, upload, refusal)
    response = response_of(refusal) or {}
    if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 501:
        return "does not know 'If-None-Match' on multipart uploads"
    if fate_of(refusal) is not Fate.TAKEN:
        raise refusal
    return None


async def probe(session: S3Session, key: str) -> str | None:
    """What is wrong with the store's conditional create, or None if it holds.

    Args:
        session: the bucket.
        key: a key that nobody else uses; deleted again.
    """
    try:
        first = await _conditional(session, key, b"1")
        second = await _conditional(session, key, b"2")
    except _NotImplementedThere:
        return "does not know 'If-None-Match'"
    finally:
        await session.send("delete_object", {"Key": key})
    if second is not None:
        return "ignores 'If-None-Match'"
    headers = (first or {}).get("ResponseMetadata", {}).get("HTTPHeaders", {})
    if any(name in headers for name in _BEST_EFFORT_HEADERS):
        return "keeps 'If-None-Match' only as best effort"
    return None


class _NotImplementedThere(Exception):
    """The server answered 501 to the condition."""


async def _conditional(session: S3Session, key: str, body: bytes) -> dict[str, Any] | None:
    """The answer to a conditional PUT of the probe; None if its condition was refused."""
    query = {"Key": key, "Body": body, "IfNoneMatch": "*", **session.sums(body)}
    try:
        answer: dict[str, Any] = await session.send("put_object", query)
    except Exception as error:
        if fate_of(error) is Fate.TAKEN:
            return None
        response = response_of(error) or {}
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode") == 501:
            raise _NotImplementedThere from None
        raise
    return answer
