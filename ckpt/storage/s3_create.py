"""Exclusive create on S3 by ``If-None-Match: *``, and the proof that a store keeps it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from .faultpoints import hit
from .retry import Fate, fate_of, response_of
from .s3_session import S3Session

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
