"""Who may do what: bearer tokens with scopes, shown in a header or, by browsers, in a cookie.

Every path is closed unless it is named as public here, and every operation says which scope it
needs; :func:`undeclared` finds those that do not. Tokens are kept as SHA-256 digests, compared in
constant time, and never written to a log or an answer.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any, Final

from fastapi import FastAPI, HTTPException, Request
from fastapi.routing import RouteContext, iter_route_contexts
from starlette.datastructures import Headers

from ckpt.errors import ConfigError

TOKENS_VARIABLE: Final = "CKPT_SERVE_TOKENS"
COOKIE: Final = "ckpt_token"
MIN_TOKEN: Final = 16
MAX_TOKEN: Final = 4096
_MAX_FILE: Final = 1024 * 1024
_HASHED: Final = re.compile(r"sha256:([0-9a-f]{64})")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})

PUBLIC: Final = frozenset({"/healthz", "/readyz", "/login", "/logout"})
"""Paths that need no token. They tell nothing of what the roots hold."""
PUBLIC_PREFIXES: Final = ("/static/",)
"""Style and script of the pages."""


class Scope(IntEnum):
    """What a token allows; each includes those before it."""

    read = 1
    lease = 2
    admin = 3


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller whose token is known.

    Attributes:
        name: the token's name, for logs and records of jobs.
        scope: what it may do.
        by_cookie: whether a browser sent the token by itself.
    """

    name: str
    scope: Scope
    by_cookie: bool = False


LOCAL: Final = Principal("local", Scope.admin)
"""Whoever calls a service without tokens, which listens on loopback alone."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token's SHA-256, what it allows, and its name."""

    digest: bytes = field(repr=False)
    scope: Scope
    name: str


class TokenSet:
    """The tokens of a service.

    Args:
        tokens: their names differ.

    Raises:
        ConfigError: two tokens are equal, or have one name.
    """

    def __init__(self, tokens: Iterable[Token] = ()) -> None:
        self._tokens = tuple(tokens)
        names = [token.name for token in self._tokens]
        if len(set(names)) < len(names):
            raise ConfigError("two tokens have one name; give each a name of its own")
        if len({token.digest for token in self._tokens}) < len(names):
            raise ConfigError("a token stands there twice")

    def __len__(self) -> int:
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"TokenSet({len(self)} tokens)"

    @classmethod
    def read(cls, path: Path | None) -> TokenSet:
        """From a file and from ``CKPT_SERVE_TOKENS``: ``SCOPE TOKEN [NAME]`` a line.

        Instead of the token, ``sha256:`` and the hexadecimal SHA-256 of it may stand there. What
        follows a ``#`` at the beginning of a line is a comment; in the variable ``;`` ends a line,
        too.

        Raises:
            ConfigError: no such file, or a line that is not of that form; never quotes a token.
        """
        lines: list[tuple[str, str]] = []
        if path is not None:
            try:
                with path.open("rb") as file:
                    data = file.read(_MAX_FILE + 1)
            except OSError as error:
                msg = f"cannot read the tokens in {path}: {error.strerror}"
                raise ConfigError(msg) from error
            if len(data) > _MAX_FILE:
                raise ConfigError(f"{path} is larger than {_MAX_FILE} bytes; it is no token file")
            texts = data.decode("utf-8", "replace").splitlines()
            lines += [(f"{path}:{number}", text) for number, text in enumerate(texts, 1)]
        environment = os.environ.get(TOKENS_VARIABLE, "").replace(";", "\n").splitlines()
        lines += [(f"{TOKENS_VARIABLE}, entry {n}", text) for n, text in enumerate(environment, 1)]
        return cls(_parsed(lines))

    def principal(self, secret: str, *, by_cookie: bool = False) -> Principal | None:
        """Whose token that is, or None; takes as long whichever it is."""
        shown = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
        found = None
        for token in self._tokens:
            if hmac.compare_digest(shown, token.digest):
                found = Principal(token.name, token.scope, by_cookie)
        return found


def _parsed(lines: Iterable[tuple[str, str]]) -> Iterator[Token]:
    for where, line in lines:
        parts = line.split()
        if not parts or parts[0].startswith("#"):
            continue
        if len(parts) not in (2, 3) or parts[0] not in Scope.__members__:
            msg = f"{where} must be SCOPE TOKEN [NAME] with a scope of {[s.name for s in Scope]}"
            raise ConfigError(msg)
        scope, secret = Scope[parts[0]], parts[1]
        hashed = _HASHED.fullmatch(secret)
        if hashed is None and not (
            MIN_TOKEN <= len(secret) <= MAX_TOKEN and secret.isascii() and secret.isprintable()
        ):
            msg = f"{where}: a token has {MIN_TOKEN} to {MAX_TOKEN} printable ASCII characters"
            raise ConfigError(msg)
        digest = (
            hashlib.sha256(secret.encode()).digest() if hashed is None else bytes.fromhex(hashed[1])
        )
        name = parts[2] if len(parts) == 3 else f"{scope.name}-{digest.hex()[:8]}"
        if not _NAME.fullmatch(name):
            msg = f"{where}: a token's name has 1 to 64 letters, digits, '_', '.' or '-'"
            raise ConfigError(msg)
        yield Token(digest, scope, name)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request goes no further: the status, and a sentence for the caller."""

    status: int
    message: str


class Gate:
    """Decides about a request before anything of it is done.

    Args:
        tokens: what callers may show; without any, every caller on loopback is an admin.
        hosts: names in the ``Host`` header, beside those of loopback, answered without tokens.
    """

    def __init__(self, tokens: TokenSet, hosts: frozenset[str] = frozenset()) -> None:
        self._tokens = tokens
        self._hosts = _LOCAL_NAMES | hosts

    @property
    def open(self) -> bool:
        """Whether no token is needed."""
        return not self._tokens

    def judge(self, method: str, path: str, headers: Headers) -> Principal | Refusal | None:
        """Who calls, why not, or None for a public path without a token that is known."""
        if self.open:
            # A page in a browser on this machine reaches loopback too, but under another name.
            if host_of(headers.get("host", "")) not in self._hosts:
                return Refusal(403, "without tokens, only callers that name loopback are answered")
            principal: Principal | None = LOCAL
        else:
            principal = self._known(headers)
        if principal is None and not is_public(path):
            return Refusal(401, "show a token: Authorization: Bearer ...")
        implicit = self.open or (principal is not None and principal.by_cookie)
        if implicit and method not in _SAFE_METHODS and not same_origin(headers):
            return Refusal(403, "a page of another origin may not change anything")
        return principal

    def _known(self, headers: Headers) -> Principal | None:
        shown = headers.get("authorization")
        if shown is not None:
            kind, _, secret = shown.partition(" ")
            return self._tokens.principal(secret.strip()) if kind.lower() == "bearer" else None
        sent = cookie_token(headers)
        return None if sent is None else self._tokens.principal(sent, by_cookie=True)

    def login(self, secret: str) -> Principal | None:
        """Whose token that is, for a page that asks for one."""
        return LOCAL if self.open else self._tokens.principal(secret, by_cookie=True)


def cookie_token(headers: Headers) -> str | None:
    """The token that a browser sends along, or None."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if morsel is None else morsel.value


def same_origin(headers: Headers) -> bool:
    """Whether a request is from no page, or from one of this very service."""
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site in {"same-origin", "none"}
    origin = headers.get("origin")
    return origin is None or origin.partition("://")[2] == headers.get("host")


def host_of(header: str) -> str:
    """The name or address in a ``Host`` header, without the port."""
    host = header.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


class Needs:
    """A dependency of an operation: the scope that it needs.

    Used as ``dependencies=[Depends(Needs(Scope.lease))]``, on a router or an operation; where
    there are several, the highest counts, for each is checked.

    Args:
        scope: the scope.
    """

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    async def __call__(self, request: Request) -> None:
        """Refuse a caller whose token does not allow it.

        Raises:
            HTTPException: 403.
        """
        caller = principal_of(request)
        if caller is None or caller.scope < self.scope:
            raise HTTPException(403, f"this needs a token with the scope {self.scope.name!r}")


def principal_of(request: Request) -> Principal | None:
    """Who calls; None only on public paths."""
    return getattr(request.state, "principal", None)


def scopes_of(route: RouteContext) -> list[Scope]:
    """The scopes that an operation says it needs."""

    def walk(dependant: Any) -> Iterator[Scope]:
        if isinstance(dependant.call, Needs):
            yield dependant.call.scope
        for inner in dependant.dependencies:
            yield from walk(inner)

    dependant = getattr(route, "dependant", None)
    return [] if dependant is None else list(walk(dependant))


def is_public(path: str) -> bool:
    """Whether a path is answered without a token."""
    return path in PUBLIC or path.startswith(PUBLIC_PREFIXES)


def undeclared(app: FastAPI) -> list[str]:
    """Paths of operations that are neither public nor say which scope they need."""
    return [
        path
        for route in iter_route_contexts(app.routes)
        if not is_public(path := route.path or "") and not is_static(path) and not scopes_of(route)
    ]


def is_static(path: str) -> bool:
    """Whether a path is where the pages' own files are mounted."""
    return f"{path}/" in PUBLIC_PREFIXES
