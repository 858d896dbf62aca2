"""Requests to a service: its address, the caller's token, repetition within a time, errors.

Nothing is repeated that could be done twice: creating a job is asked for once. The token goes to
the service that was named and to nobody else, since redirects are not followed.
"""

from __future__ import annotations

import json as json_text
import os
import random
import re
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx

from ckpt import errors
from ckpt.errors import CkptError, ConfigError, ObjectNotFound, StorageError

from .traffic import Meter

TOKEN: Final = "CKPT_TOKEN"  # noqa: S105 - the variable's name
TOKEN_FILE: Final = "CKPT_TOKEN_FILE"  # noqa: S105 - the variable's name
DEADLINE_S: Final = 60.0
"""For one request with all its repetitions, unless it waits for something."""
CONNECT_S: Final = 10.0
FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
AGAIN: Final = frozenset({429, 502, 503, 504})
_OPTIONS: Final = frozenset({"token", "token_file", "timeout_s", "transport"})
_RUN: Final = re.compile(r"(?P<base>.*?)(/v1)?/runs/(?P<run>[A-Za-z0-9][A-Za-z0-9_-]{0,99})")
_MAX_TOKEN: Final = 4096


@dataclass(frozen=True, slots=True)
class Address:
    """Where a service answers, and which of its runs is meant.

    Attributes:
        base: ``https://host:port`` with the path below which the service lies, if any.
        run: the run's name there, or None for the only one.
    """

    base: str
    run: str | None

    @classmethod
    def parse(cls, url: str) -> Address:
        """From the service's address, that of a run's page, or that of a run in the API.

        Raises:
            ConfigError: no such address, or one with credentials.
        """
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            msg = f"a service's address is http(s)://host[:port][/runs/NAME], got {url!r}"
            raise ConfigError(msg)
        if "@" in parts.netloc or parts.query or parts.fragment:
            msg = (
                "a service's address must hold no credentials and no query; set "
                f"{TOKEN} or {TOKEN_FILE}"
            )
            raise ConfigError(msg)
        path = parts.path.rstrip("/")
        match = _RUN.fullmatch(path)
        below = path.removesuffix("/v1") if match is None else match["base"]
        base = f"{parts.scheme}://{parts.netloc}{below}"
        return cls(base, None if match is None else match["run"])


def find_token(options: Mapping[str, Any]) -> str | None:
    """The token to show: of the options, a file that they name, or the environment.

    Raises:
        ConfigError: a file that cannot be read, or a token that no header can carry.
    """
    token = options.get("token")
    file = options.get("token_file")
    if token is None and file is None:
        token, file = os.environ.get(TOKEN) or None, os.environ.get(TOKEN_FILE) or None
    if token is None and file is not None:
        try:
            with Path(file).open("rb") as opened:
                token = opened.read(_MAX_TOKEN + 1).decode("latin-1").strip()
        except OSError as error:
            msg = f"cannot read the token in {file}: {error.strerror}"
            raise ConfigError(msg) from error
    if token is None:
        return None
    if not token or len(token) > _MAX_TOKEN or not token.isascii() or not token.isprintable():
        raise ConfigError(f"a token has 1 to {_MAX_TOKEN} printable ASCII characters")
    return str(token)


def error_of(status: int, content: bytes, what: str) -> CkptError:
    """The error that an answer stands for: that of the package which the service met.

    Args:
        status: of the answer.
        content: its body.
        what: what was asked for, for the message.
    """
    kind, message = "", f"HTTP {status}"
    try:
        body = json_text.loads(content)
        kind, message = str(body["error"]["type"]), str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        pass  # a proxy's answer, not ours
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, CkptError):
        return known(message)
    if status == 404:
        return ObjectNotFound(f"{what}: {message}")
    if status in {401, 403}:
        return StorageError(f"{what}: {message}; set {TOKEN} or {TOKEN_FILE}")
    if 400 <= status < 500 and status not in {408, 429}:
        return ConfigError(f"{what}: {message}")
    return StorageError(f"{what}: {message}")


def pause_s(attempt: int, retry_after: str | None = None) -> float:
    """Seconds until the next try: what the service says, or ever longer, never in step."""
    if retry_after is not None and retry_after.isascii() and retry_after.isdigit():
        return min(float(retry_after), 30.0) + random.uniform(0, 0.1)
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**attempt) * random.uniform(0.5, 1.0)


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing here.

    Raises:
        ConfigError: names one.
    """
    unknown = sorted(set(options) - _OPTIONS)
    if unknown:
        msg = f"a service takes the options token, token_file and timeout_s, got {unknown[0]!r}"
        raise ConfigError(msg)


def headers_of(token: str | None) -> dict[str, str]:
    """What every request carries."""
    return {} if token is None else {"Authorization": f"Bearer {token}"}


class HttpSession:
    """Connections to one service; thread-safe.

    Args:
        address: from :meth:`Address.parse`.
        options: ``token``, ``token_file``, ``timeout_s``.

    Raises:
        ConfigError: an option that is none, or a token that cannot be used.
    """

    def __init__(self, address: Address, options: Mapping[str, Any]) -> None:
        check_options(options)
        self.base = address.base
        self.timeout_s = float(options.get("timeout_s", DEADLINE_S))
        self.meter = Meter()
        self._headers = headers_of(find_token(options))
        self._transport = options.get("transport")
        self._client: httpx.Client | None = None
        self._pid = 0
        self._at_end: weakref.finalize[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"HttpSession({self.base!r})"

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        client, self._client = self._client, None
        if client is not None and self._pid == os.getpid():
            client.close()
            if self._at_end is not None:
                self._at_end.detach()

    def get(self, path: str, what: str, **more: Any) -> httpx.Response:
        """A GET, repeated within its time; see :meth:`request`."""
        return self.request("GET", path, what, **more)

    def request(
        self,
        method: str,
        path: str,
        what: str,
        *,
        params: Mapping[str, Any] | None = None,
        json: Any = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        wait_s: float = 0.0,
        repeat: bool = True,
        fine: frozenset[int] = frozenset(),
    ) -> httpx.Response:
        """One request with its whole answer.

        Args:
            method: of HTTP.
            path: below the service's address, quoted.
            what: is asked for, for messages.
            params: of the query; None values are left out.
            json: the body, as a document.
            content: the body, as it is.
            headers: more headers.
            wait_s: seconds for which the service is asked to wait for something.
            repeat: whether it may be done twice.
            fine: statuses that are answers and no errors.

        Raises:
            CkptError: the one that the service met.
            StorageError: no answer in time.
        """
        query = {key: value for key, value in (params or {}).items() if value is not None}
        deadline = time.monotonic() + self.timeout_s + wait_s
        attempt = 0
        while True:
            self.meter.add(requests=1)
            retry_after = None
            try:
                left = max(0.1, deadline - time.monotonic())
                answer = self._connection().request(
                    method,
                    self.base + path,
                    params=query,
                    json=json,
                    content=content,
                    headers=dict(headers or {}),
                    timeout=httpx.Timeout(left, connect=min(left, CONNECT_S)),
                )
                self.meter.add(received=len(answer.content))
                if answer.is_success or answer.status_code in fine:
                    return answer
                problem: CkptError = error_of(answer.status_code, answer.content, what)
                again = answer.status_code in (AGAIN if repeat else {429})
                retry_after = answer.headers.get("retry-after")
            except httpx.TransportError as error:
                reason = str(error) or type(error).__name__
                problem = StorageError(f"{what}: {self.base} does not answer: {reason}")
                again = repeat or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            pause = pause_s(attempt, retry_after)
            if not again or time.monotonic() + pause > deadline:
                raise problem
            time.sleep(pause)
            attempt += 1

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, Any], read_s: float
    ) -> Iterator[httpx.Response]:
        """An answer that goes on; not repeated.

        Raises:
            CkptError: the one that the service met.
            StorageError: no answer, or it ends early.
        """
        query = {key: value for key, value in params.items() if value is not None}
        timeout = httpx.Timeout(self.timeout_s, connect=CONNECT_S, read=read_s)
        try:
            with self._connection().stream(
                "GET", self.base + path, params=query, timeout=timeout
            ) as answer:
                if not answer.is_success:
                    raise error_of(answer.status_code, answer.read(), "events")
                yield answer
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise StorageError(f"{self.base} does not answer: {reason}") from error

    def _connection(self) -> httpx.Client:
        if self._client is None or self._pid != os.getpid():
            self._client = httpx.Client(headers=self._headers, transport=self._transport)
            self._pid = os.getpid()
            self._at_end = weakref.finalize(self, self._client.close)
        return self._client


def quoted(path: str) -> str:
    """A path with ``/`` between its parts, for a URL."""
    return quote(path, safe="/")
