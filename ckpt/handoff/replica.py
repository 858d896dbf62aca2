"""One replica's HTTP side: deadlines for whole answers, bounded repetition, safe messages.

What is asked and how answers are understood is the drivers' part. Reads are repeated a few times
when the replica does not answer; whatever changes the replica is sent once, since who sends it
again has to look first whether it was done.
"""

from __future__ import annotations

import json
import os
import ssl
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import httpx

from ckpt.errors import ConfigError

from .engine import AdapterRefused, EngineError, EngineUnreachable

T = TypeVar("T")

DEFAULT_TIMEOUT_S: Final = 30.0
CONNECT_S: Final = 5.0
"""A replica on a host that is down does not answer at all; this is how long we believe in it."""

READ_REPEATS: Final = 2
_REPEAT_PAUSE_S: Final = 0.2
_READY_PAUSE_S: Final = 0.2
_PASSING: Final = frozenset({502, 503, 504})
"""Answers of proxies, and of servers that are starting."""

_ANSWER_MAX: Final = 32 * 1024 * 1024
_SHOWN_MAX: Final = 300


class Replica:
    """Requests to one address.

    Args:
        url: ``http://host:port``, or ``https``; a path in front of the API's is kept.
        api_key: sent as a bearer token, and never shown.
        timeout_s: longest time for one answer. It counts anew once the answer has begun, so a call
            ends within twice that.

    Raises:
        ConfigError: no such URL, or a time that is none.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self.url = check_url(url)
        if not 0 < timeout_s < float("inf"):
            msg = f"timeout_s must be a positive number of seconds, got {timeout_s!r}"
            raise ConfigError(msg)
        self.timeout_s = timeout_s
        self._secret = api_key or None
        headers = {} if self._secret is None else {"Authorization": f"Bearer {self._secret}"}
        # The environment's proxies and netrc are not for a replica, and would see the key.
        # Whom to trust is, though: an https replica often has a certificate of its own house's.
        self._client = httpx.Client(
            headers=headers, trust_env=False, follow_redirects=False, verify=_trusted(self.url)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def wait_until(self, path: str, timeout_s: float) -> None:
        """Return once a GET of ``path`` succeeds.

        Raises:
            EngineUnreachable: it does not in time.
            EngineError: it answers that it never will (a wrong key, no such path).
        """
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            try:
                self._send("GET", path, None, max(min(left, self.timeout_s), 0.001), "is it ready?")
                return
            except EngineError as error:
                if not _may_pass(error) or time.monotonic() + _READY_PAUSE_S >= deadline:
                    raise
            time.sleep(_READY_PAUSE_S)

    def read(self, path: str, what: str, body: Mapping[str, Any] | None = None) -> Any:
        """Ask something that changes nothing; JSON of the answer.

        Args:
            path: of the API.
            what: for the message: what is asked.
            body: sent as JSON by POST; None for a GET.

        Raises:
            EngineUnreachable: no answer, however often it was asked.
            EngineError: an answer that is no success, or no JSON.
        """
        return self._json(path, what, self.read_text(path, what, body))

    def read_text(self, path: str, what: str, body: Mapping[str, Any] | None = None) -> str:
        """As :meth:`read`, the answer's text."""
        method = "GET" if body is None else "POST"
        for left in reversed(range(READ_REPEATS + 1)):
            try:
                return self._send(method, path, body, self.timeout_s, what)
            except EngineError as error:
                # A replica that took all the time it had would take it again.
                stuck = isinstance(error.__cause__, httpx.TimeoutException | _TooSlow)
                if not left or stuck or not _may_pass(error):
                    raise
            time.sleep(_REPEAT_PAUSE_S)
        raise AssertionError("unreachable")

    def change(
        self, path: str, what: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> str:
        """Ask once for something that changes the replica; text of the answer.

        Raises:
            EngineUnreachable: no answer; it may have been done.
            EngineError: an answer that is no success.
        """
        return self._send("POST", path, body, timeout_s or self.timeout_s, what)

    def expect(self, path: str, what: str, pick: Callable[[Any], T], answer: Any) -> T:
        """What ``pick`` finds in an answer.

        Raises:
            EngineError: it is not there.
        """
        try:
            return pick(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            shown = self._shown(json.dumps(answer))
            remedy = f"{path} does not answer as this driver knows it; check the engine's version"
            raise EngineError(self.url, what, shown, remedy) from error

    def _json(self, path: str, what: str, text: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            remedy = f"{path} should answer JSON; is this the engine's own address?"
            raise EngineError(self.url, what, self._shown(text), remedy) from error

    def _send(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float, what: str
    ) -> str:
        deadline = time.monotonic() + timeout_s
        timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_S, timeout_s))
        try:
            with self._client.stream(
                method, self.url + path, json=body, timeout=timeout
            ) as response:
                text = _read_all(response, deadline).decode(errors="replace")
                status = response.status_code
        except (httpx.HTTPError, httpx.InvalidURL, _TooSlow) as error:
            slow = isinstance(error, httpx.TimeoutException | _TooSlow)
            answer = f"no answer within {timeout_s:g} s" if slow else "no answer"
            reason = self._shown(str(error) or type(error).__name__)
            remedy = "see whether the replica runs and is not stuck"
            raise EngineUnreachable(self.url, what, f"{answer} ({reason})", remedy) from error
        if 200 <= status < 300:
            return text
        raise EngineError(
            self.url, what, self._shown(text) or "an empty answer", _remedy(status), status=status
        )

    def refused(self, error: EngineError, what: str, remedy: str) -> AdapterRefused:
        """The same answer, as a refusal of an adapter."""
        return AdapterRefused(self.url, what, error.answer, remedy, status=error.status)

    def _shown(self, text: str) -> str:
        """Fit for a message: one line, short, without the key."""
        if self._secret is not None:
            text = text.replace(self._secret, "***")
        line = " ".join(text.split())
        return line if len(line) <= _SHOWN_MAX else f"{line[:_SHOWN_MAX]}…"


class _TooSlow(Exception):
    """The answer's bytes came, but too slowly or too many of them."""


def _read_all(response: httpx.Response, deadline: float) -> bytes:
    parts: list[bytes] = []
    size = 0
    for part in response.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > _ANSWER_MAX:
            msg = f"the answer is larger than {_ANSWER_MAX} bytes"
            raise _TooSlow(msg)
        if time.monotonic() > deadline:
            raise _TooSlow("the answer came too slowly")
    return b"".join(parts)


def check_url(url: str) -> str:
    """An engine's address, without a slash at its end.

    Raises:
        ConfigError: it is not ``http://`` or ``https://`` with a host, or it holds a user, a
            password, a query or a fragment.
    """
    try:
        parts = urlsplit(url)
        bad = parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0
        extra = parts.username or parts.password or parts.query or parts.fragment
    except (ValueError, AttributeError, TypeError):
        bad, extra = True, None
    if bad or extra:
        where = "" if bad else f", got one with more than that for {parts.hostname}"
        msg = f"an engine's address is http://host:port, without user or query{where}"
        raise ConfigError(msg)
    return url.rstrip("/")


def _trusted(url: str) -> ssl.SSLContext | bool:
    """Whose certificates to take: the usual ones, or what OpenSSL's variables name.

    Raises:
        ConfigError: they name nothing that can be read.
    """
    file, folder = os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR")
    if not url.startswith("https:") or not (file or folder):
        return True
    try:
        return ssl.create_default_context(cafile=file or None, capath=folder or None)
    except OSError as error:
        msg = f"SSL_CERT_FILE or SSL_CERT_DIR names no certificates: {error}"
        raise ConfigError(msg) from error


def _may_pass(error: EngineError) -> bool:
    return error.status in _PASSING or isinstance(error, EngineUnreachable)


def _remedy(status: int) -> str:
    if status in (401, 403):
        return "give the key that the replica was started with"
    if status == 404:
        return "check the address, and that the replica was started as docs/engines.md says"
    if status >= 500:
        return "see the replica's own log"
    return "see docs/engines.md for what the engine accepts"
