"""When and how often a request to an object store is repeated; the only layer that does so."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, TypeVar

from ckpt.errors import ConfigError

T = TypeVar("T")

_RETRY_CODES = frozenset(
    {
        "InternalError",
        "OperationAborted",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
        "BadDigest",
    }
)
"""S3 error codes that a later try may not meet; the last two mean bytes damaged on the way."""

_NOT_SENT = frozenset({"ConnectTimeoutError", "EndpointConnectionError", "ClientConnectorError"})
"""Exceptions (by class name) of a connection that never came about: nothing reached the server."""


class Fate(Enum):
    """What an error says about a request."""

    MISSING = "missing"
    """The object is not there."""
    TAKEN = "taken"
    """A condition failed: the object is there already."""
    CONFLICT = "conflict"
    """Another conditional request on this name is under way; try again."""
    NOT_SENT = "not sent"
    """No connection; nothing happened. Try again."""
    UNKNOWN = "unknown"
    """The server may or may not have done it. Try again."""
    FATAL = "fatal"
    """Trying again is of no use."""

    @property
    def final(self) -> bool:
        """Whether another try would meet the same answer."""
        return self in {Fate.MISSING, Fate.TAKEN, Fate.FATAL}


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Bounds on repetition.

    Attributes:
        attempts: tries in all, the first one included.
        base: seconds of the first pause; it doubles from try to try.
        cap: longest pause in seconds.
        seconds: time limit of one try, to which the time for its bytes is added.
        bytes_per_second: slowest transfer that is waited for.
    """

    attempts: int = 6
    base: float = 0.1
    cap: float = 5.0
    seconds: float = 60.0
    bytes_per_second: float = 256 * 1024

    def __post_init__(self) -> None:
        """Refuse bounds that bound nothing.

        Raises:
            ConfigError: a value that is not a positive number, or no whole number of tries.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            kinds = (int,) if field.name == "attempts" else (int, float)
            if isinstance(value, bool) or not isinstance(value, kinds) or not value > 0:
                what = "whole number" if field.name == "attempts" else "number"
                msg = f"retry {field.name} must be a positive {what}, got {value!r}"
                raise ConfigError(msg)

    @classmethod
    def from_option(cls, option: object) -> RetryPolicy:
        """The policy that a storage option describes: a mapping of this class's attributes.

        Raises:
            ConfigError: it is something else, or has a key that is no attribute.
        """
        if not isinstance(option, Mapping):
            msg = f"the option retry must be a mapping, got {type(option).__name__}"
            raise ConfigError(msg)
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in option if key not in known]
        if unknown:
            msg = f"the option retry takes {known}, got {unknown}"
            raise ConfigError(msg)
        return cls(**option)

    def pause(self, attempt: int) -> float:
        """Seconds to wait after try number ``attempt`` (from 0), with jitter of a half."""
        pause = min(self.cap, self.base * 2.0**attempt)
        return pause * random.uniform(0.5, 1.0)

    def limit(self, size: int) -> float:
        """Seconds one try may take that moves ``size`` bytes."""
        return self.seconds + size / self.bytes_per_second


def response_of(error: BaseException) -> dict[str, Any] | None:
    """The server's answer that an exception of botocore or s3fs stands for, or None."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict) and "Error" in response:
            return response
    return None


def fate_of(error: BaseException) -> Fate:
    """Classify by HTTP status and error code, never by exception type alone.

    Servers differ in what they say beside the status, and s3fs maps the same answer to different
    exceptions depending on it.
    """
    response = response_of(error)
    if response is None:
        chain = (error, error.__cause__)
        if any(type(link).__name__ in _NOT_SENT for link in chain if link is not None):
            return Fate.NOT_SENT
        return Fate.UNKNOWN if _is_transport(error) else Fate.FATAL
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    code = str(response["Error"].get("Code", ""))
    if code in {"NoSuchBucket", "NoSuchUpload"}:
        return Fate.FATAL
    if status == 404 or code in {"NoSuchKey", "404"}:
        return Fate.MISSING
    if status == 412 or code == "PreconditionFailed":
        return Fate.TAKEN
    if status == 409 and code == "ConditionalRequestConflict":
        return Fate.CONFLICT
    if (
        code in _RETRY_CODES
        or status in {408, 429}
        or (status in range(500, 600) and status != 501)
    ):
        return Fate.UNKNOWN
    return Fate.FATAL


def _is_transport(error: BaseException) -> bool:
    """Whether the error is one of the connection, not of the request or of our own code.

    aiohttp's, urllib3's and botocore's transport errors share no parent class, so their modules
    tell; parameter and credential errors of botocore are told apart by name.
    """
    if isinstance(error, TimeoutError | ConnectionError | asyncio.IncompleteReadError | EOFError):
        return True
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError):
        return False
    package = type(error).__module__.partition(".")[0]
    if package in {"aiohttp", "urllib3", "http", "httpx", "httpcore", "ssl"}:
        return True
    if package in {"botocore", "aiobotocore"}:
        return any(
            parent.__name__
            in {
                "HTTPClientError",
                "ConnectionError",
                "IncompleteReadError",
                "ResponseParserError",
                "FlexibleChecksumError",
                "ReadTimeoutError",
            }
            for parent in type(error).__mro__
        )
    return type(error).__name__ == "FSTimeoutError"


async def retrying(policy: RetryPolicy, size: int, send: Callable[[], Awaitable[T]]) -> T:
    """Send until it succeeds, the error is final, or the tries are used up.

    Args:
        policy: bounds.
        size: bytes the request moves, for its time limit.
        send: makes and awaits one request; called anew for each try.

    Raises:
        Exception: the last try's error, as it came.
    """
    attempt = 0
    while True:
        try:
            return await asyncio.wait_for(send(), policy.limit(size))
        except Exception as error:
            attempt += 1
            if fate_of(error).final or attempt >= policy.attempts:
                raise
        await asyncio.sleep(policy.pause(attempt - 1))
