"""What is tried again, how often, and with what pauses."""

from __future__ import annotations

import asyncio
import ssl

import aiohttp
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)

from ckpt.errors import ConfigError
from ckpt.storage.retry import Fate, RetryPolicy, fate_of, retrying


def answer(status: int, code: str) -> ClientError:
    return ClientError(
        {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def translated(error: ClientError) -> OSError:
    """As s3fs gives it to us: another type, the answer as its cause."""
    outer = OSError(22, "Invalid argument")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "fate"),
    [
        (answer(404, "NoSuchKey"), Fate.MISSING),
        (answer(404, "404"), Fate.MISSING),
        (answer(404, "NoSuchBucket"), Fate.FATAL),
        (answer(404, "NoSuchUpload"), Fate.FATAL),
        (answer(412, "PreconditionFailed"), Fate.TAKEN),
        (answer(412, "412"), Fate.TAKEN),
        (translated(answer(412, "PreconditionFailed")), Fate.TAKEN),
        (answer(409, "ConditionalRequestConflict"), Fate.CONFLICT),
        (answer(409, "BucketNotEmpty"), Fate.FATAL),
        (answer(500, "InternalError"), Fate.UNKNOWN),
        (answer(502, "BadGateway"), Fate.UNKNOWN),
        (answer(503, "SlowDown"), Fate.UNKNOWN),
        (answer(429, "TooManyRequests"), Fate.UNKNOWN),
        (answer(400, "RequestTimeout"), Fate.UNKNOWN),
        (answer(400, "BadDigest"), Fate.UNKNOWN),
        (answer(501, "NotImplemented"), Fate.FATAL),
        (answer(403, "AccessDenied"), Fate.FATAL),
        (answer(403, "InvalidAccessKeyId"), Fate.FATAL),
        (EndpointConnectionError(endpoint_url="http://x"), Fate.NOT_SENT),
        (ConnectTimeoutError(endpoint_url="http://x"), Fate.NOT_SENT),
        (ReadTimeoutError(endpoint_url="http://x"), Fate.UNKNOWN),
        (ConnectionClosedError(endpoint_url="http://x"), Fate.UNKNOWN),
        (FlexibleChecksumError(error_msg="x"), Fate.UNKNOWN),
        (aiohttp.ClientPayloadError("x"), Fate.UNKNOWN),
        (aiohttp.ServerDisconnectedError("x"), Fate.UNKNOWN),
        (ssl.SSLEOFError("x"), Fate.UNKNOWN),
        (TimeoutError(), Fate.UNKNOWN),
        (ConnectionResetError(), Fate.UNKNOWN),
        (asyncio.IncompleteReadError(b"", 3), Fate.UNKNOWN),
        (NoCredentialsError(), Fate.FATAL),
        (ParamValidationError(report="x"), Fate.FATAL),
        (FileNotFoundError(), Fate.FATAL),
        (PermissionError(), Fate.FATAL),
        (TypeError("a bug"), Fate.FATAL),
    ],
    ids=repr,
)
def test_fates(error: Exception, fate: Fate) -> None:
    assert fate_of(error) is fate


def test_pauses_grow_and_are_bounded() -> None:
    policy = RetryPolicy(base=0.1, cap=1.0)
    for attempt, whole in enumerate([0.1, 0.2, 0.4, 0.8, 1.0, 1.0]):
        pauses = [policy.pause(attempt) for _ in range(50)]
        assert all(whole / 2 <= pause <= whole for pause in pauses)
        assert len(set(pauses)) > 1  # jitter


def test_more_bytes_get_more_time() -> None:
    policy = RetryPolicy(seconds=10, bytes_per_second=100)
    assert policy.limit(0) == 10
    assert policy.limit(1000) == 20


@pytest.mark.parametrize(("failures", "tries"), [(0, 1), (2, 3), (9, 4)])
def test_tries_are_counted(failures: int, tries: int) -> None:
    made = []

    async def send() -> str:
        made.append(1)
        if len(made) <= failures:
            raise answer(503, "SlowDown")
        return "done"

    policy = RetryPolicy(attempts=4, base=0.001)
    if failures < 4:
        assert asyncio.run(retrying(policy, 0, send)) == "done"
    else:
        with pytest.raises(ClientError, match="SlowDown"):
            asyncio.run(retrying(policy, 0, send))
    assert len(made) == tries


def test_bounds_must_bound() -> None:
    assert RetryPolicy.from_option({}) == RetryPolicy()
    assert RetryPolicy.from_option({"attempts": 2, "seconds": 1}) == RetryPolicy(2, seconds=1)
    for option, message in [
        ({"attempts": 0}, "retry attempts must be a positive whole number, got 0"),
        ({"attempts": 2.5}, "positive whole number, got 2.5"),
        ({"seconds": -1}, "retry seconds must be a positive number, got -1"),
        ({"seconds": float("nan")}, "got nan"),
        ({"base": True}, "got True"),
        ({"tries": 3}, r"takes \['attempts', .* got \['tries'\]"),
        (3, "must be a mapping, got int"),
    ]:
        with pytest.raises(ConfigError, match=message):
            RetryPolicy.from_option(option)
