"""Errors as answers: one body for all of them, and a status for each kind."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ckpt.errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    DamagedError,
    HandoffTimeout,
    NoCheckpoint,
    ObjectNotFound,
    StorageError,
)
from ckpt.wire import ErrorBody

from .limits import Busy

log = logging.getLogger(__name__)

STATUS: Final[tuple[tuple[type[CkptError], int], ...]] = (
    (NoCheckpoint, 404),
    (ObjectNotFound, 404),
    (AlreadyExists, 409),
    (DamagedError, 409),
    (ConfigError, 422),
    (HandoffTimeout, 504),
    (StorageError, 503),
    (CkptError, 409),
)
"""Which status an error becomes; the first that fits."""

_TEXTS: Final = {
    401: "No token, or one that is not known.",
    403: "The token does not allow it.",
    404: "There is no such thing.",
    409: "The state of the root does not allow it, or bytes do not verify.",
    413: "The body is too long.",
    422: "The request cannot work; says why.",
    429: "Too many requests; `Retry-After` says when to come back.",
    503: "The store does not answer, or the service is busy or stopping.",
}
RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _TEXTS.items()
}
"""For the OpenAPI description of every operation of the API."""


def error_answer(
    status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The body that every error has."""
    return JSONResponse(
        {"error": {"type": kind, "message": " ".join(message.split())}},
        status_code=status,
        headers=dict(headers or {}),
    )


def http_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error that HTTP has a name for."""
    return error_answer(status, HTTPStatus(status).name.title().replace("_", ""), message, headers)


def busy_answer(busy: Busy, status: int = 503) -> JSONResponse:
    """Try later."""
    retry = {"Retry-After": str(max(1, math.ceil(busy.retry_s)))}
    return http_error(status, str(busy), retry)


def status_of(error: CkptError) -> int:
    """The status of an error of the package."""
    return next(status for kind, status in STATUS if isinstance(error, kind))


def install(app: FastAPI) -> None:
    """Make every error of an operation an answer of one form."""

    @app.exception_handler(CkptError)
    async def of_the_package(_request: Request, error: CkptError) -> Response:
        status = status_of(error)
        headers = {"Retry-After": "1"} if status == 503 else None
        return error_answer(status, type(error).__name__, str(error), headers)

    @app.exception_handler(HTTPException)
    async def of_http(_request: Request, error: HTTPException) -> Response:
        return http_error(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_the_request(_request: Request, error: RequestValidationError) -> Response:
        # What a caller sent is not sent back: it may hold a secret, or a page's script.
        found = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        return error_answer(422, "ConfigError", "; ".join(found))

    @app.exception_handler(Busy)
    async def of_load(_request: Request, error: Busy) -> Response:
        return busy_answer(error)

    @app.exception_handler(TimeoutError)
    async def of_time(_request: Request, _error: TimeoutError) -> Response:
        return busy_answer(Busy("the store does not answer in time", 5.0))

    @app.exception_handler(Exception)
    async def of_ourselves(_request: Request, _error: Exception) -> Response:
        # Starlette raises it again behind this answer, so that it is logged with its traceback.
        return http_error(500, "an error of the service itself; its log says more")
