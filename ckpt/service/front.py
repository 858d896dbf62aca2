"""What every request passes first: bounds, identity, deadlines; and what is written of it.

Plain ASGI, so that nothing of a body is read, and no route looked for, before a caller is known.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import busy_answer, http_error
from .auth import Gate, Principal, Refusal
from .config import Limits
from .limits import Busy, RateLimit
from .metrics import ServiceMetrics

FAILED_PER_SECOND: Final = 5.0
FAILED_BURST: Final = 50
"""Tokens that are not known, from one address: guessing must not be worth the while."""

SECURITY_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
        "connect-src 'self'; font-src 'self'; form-action 'self'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Nothing is loaded from elsewhere, framed, sniffed, or told to other sites."""

_CLOSE: Final = {"Connection": "close"}

log = logging.getLogger("ckpt.service.access")


class _NotTaken(OSError):
    """A caller took too long to accept a piece of its answer."""


class Front:
    """The outermost application.

    Args:
        app: what is behind it.
        gate: who may come in.
        limits: bounds.
        metrics: told what happens.
        login_path: where a browser without a token is sent, or None while there are no pages.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: Gate,
        limits: Limits,
        metrics: ServiceMetrics,
        login_path: str | None = None,
    ) -> None:
        self._app, self._gate, self._limits, self._metrics = app, gate, limits, metrics
        self._login_path = login_path
        self._rate = RateLimit(limits.per_second, limits.burst)
        self._failed = RateLimit(FAILED_PER_SECOND, FAILED_BURST)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        await _Exchange(scope, receive, send, self._limits).run(self._refusal, self._app, self)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """The answer to a request that goes no further, or None; notes who calls."""
        length = len(scope["raw_path"]) + len(scope["query_string"])
        if length > self._limits.path_chars:
            self._metrics.refused.labels("path").inc()
            return http_error(414, f"path and query have at most {self._limits.path_chars} bytes")
        if (
            sum(len(name) + len(value) for name, value in scope["headers"])
            > self._limits.head_bytes
        ):
            self._metrics.refused.labels("head").inc()
            return http_error(431, f"a head has at most {self._limits.head_bytes} bytes", _CLOSE)
        caller = (scope.get("client") or ("unknown",))[0]
        judged = self._gate.judge(scope["method"], scope["path"], headers)
        if isinstance(judged, Refusal):
            return self._turned_away(scope, headers, judged, caller)
        scope.setdefault("state", {})["principal"] = judged
        who = caller if judged is None else f"token {judged.name}"
        wait = self._rate.wait_s(who)
        if wait:
            self._metrics.refused.labels("rate").inc()
            return busy_answer(Busy("too many requests", wait), 429)
        length_text = headers.get("content-length", "0")
        if not length_text.isascii() or not length_text.isdigit():
            return http_error(400, "Content-Length is not a number")
        if int(length_text) > self._limits.body_bytes:
            self._metrics.refused.labels("body").inc()
            return http_error(413, _too_long(self._limits), _CLOSE)
        return None

    def _turned_away(
        self, scope: Scope, headers: Headers, refusal: Refusal, caller: str
    ) -> Response:
        self._metrics.refused.labels("identity").inc()
        if self._failed.wait_s(caller):
            return busy_answer(Busy("too many requests without a token that is known", 10.0), 429)
        page = scope["method"] == "GET" and "text/html" in headers.get("accept", "")
        if refusal.status == 401 and page and self._login_path is not None:
            return RedirectResponse(self._login_path, 303)
        extra = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
        return http_error(refusal.status, refusal.message, extra)

    def note(self, exchange: _Exchange) -> None:
        """Count and log an exchange that has ended."""
        operation = exchange.operation
        self._metrics.requests.labels(operation, str(exchange.status)).inc()
        if not exchange.waits:
            self._metrics.seconds.labels(operation).observe(exchange.seconds)
        log.info("%s %s", exchange.method, exchange.status, extra={"request": exchange.facts()})

    def begins(self, count: int) -> None:
        """Count the requests under way."""
        self._metrics.under_way.inc(count)


class _Exchange:
    """One request and its answer, with their bounds in time and size."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        self.scope, self._receive, self._send, self._limits = scope, receive, send, limits
        self.status = 0
        self.method = scope["method"]
        self._id = uuid.uuid4().hex[:16]
        self._begun = time.monotonic()
        self.seconds = 0.0
        self._body_bytes = 0
        self._sent_bytes = 0
        self._body_until = self._begun + limits.body_s
        self._body_ended = False
        scope.setdefault("state", {})["request_id"] = self._id

    @property
    def operation(self) -> str:
        """The name of the function that answered: a bounded set, unlike paths."""
        return getattr(self.scope.get("endpoint"), "__name__", "none")

    @property
    def waits(self) -> bool:
        """Whether it was to wait for something, so that its time says nothing."""
        return bool(self.scope.get("ckpt_waits"))

    def facts(self) -> dict[str, Any]:
        """What is written to the log: neither the query nor any header."""
        principal: Principal | None = self.scope["state"].get("principal")
        client = self.scope.get("client")
        return {
            "id": self._id,
            "method": self.method,
            "path": self.scope["path"],
            "status": self.status,
            "ms": round(1000 * self.seconds, 2),
            "bytes": self._sent_bytes,
            "caller": None if principal is None else principal.name,
            "client": None if client is None else client[0],
        }

    async def run(
        self,
        refuse: Callable[[Scope, Headers], Response | None],
        app: ASGIApp,
        front: Front,
    ) -> None:
        """Answer, and see to it that it ends."""
        front.begins(1)
        try:
            refusal = refuse(self.scope, Headers(scope=self.scope))
            answering = app if refusal is None else refusal
            await answering(self.scope, self._bounded_receive, self._bounded_send)
        except (_NotTaken, ClientDisconnect):
            # Nobody is there to be told; the server closes what was not ended.
            log.debug("the caller of %s went away", self._id)
        finally:
            self.seconds = time.monotonic() - self._begun
            front.begins(-1)
            front.note(self)

    async def _bounded_receive(self) -> Message:
        if self._body_ended:
            return await self._receive()  # waits for the caller to go away
        try:
            async with asyncio.timeout(max(0.0, self._body_until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the body did not come in time", _CLOSE) from None
        self._body_bytes += len(message.get("body", b""))
        if self._body_bytes > self._limits.body_bytes:
            raise HTTPException(413, _too_long(self._limits), _CLOSE)
        self._body_ended = not message.get("more_body", False)
        return message

    async def _bounded_send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
            headers["X-Request-Id"] = self._id
        elif message["type"] == "http.response.body":
            self._sent_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._limits.send_s):
                await self._send(message)
        except TimeoutError:
            raise _NotTaken from None


def _too_long(limits: Limits) -> str:
    return f"a body has at most {limits.body_bytes} bytes"
