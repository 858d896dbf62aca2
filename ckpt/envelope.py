"""Small JSON documents that prove themselves: canonical form, schema version, self-hash.

A document is one JSON object with the members ``format`` (what it is), ``schema`` (an integer
version), ``sha256`` and the body's own members. Its bytes are *canonical*: UTF-8, keys sorted
by code point, no white space, no escapes but those JSON demands, integers in decimal, other
numbers as Python's ``repr`` of the IEEE double (shortest digits that read back the same).
``sha256`` is the SHA-256 (hex) of the canonical bytes of the object without that member. A reader
refuses bytes that are not canonical, so every bit of the file counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

from .errors import ConfigError, DamagedError
from .layout import path_problem

T = TypeVar("T")

INT_MAX = 2**63 - 1
_MAX_DEPTH = 100
_SHA256 = re.compile(r"[0-9a-f]{64}")


def canonical_json(value: Any) -> bytes:
    """The one byte form of a JSON value (see the module's text).

    Raises:
        ConfigError: NaN, infinity, a key that is not text, or a type that JSON does not have.
    """
    return _dump(plain_json(value))


def _dump(plain: Any) -> bytes:
    """The canonical bytes of a value that is known to be plain JSON."""
    try:
        text = json.dumps(
            plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )
        return text.encode("utf-8")
    except ValueError as error:
        msg = f"cannot be written as JSON: {error}"
        raise ConfigError(msg) from None


def _join(members: Mapping[str, bytes]) -> bytes:
    """The canonical bytes of an object from those of its members."""
    return b"{" + b",".join(_dump(key) + b":" + members[key] for key in sorted(members)) + b"}"


def plain_json(value: Any, path: str = "value", depth: int = 0) -> Any:
    """The value built of dict, list, str, int, float, bool and None alone.

    Raises:
        ConfigError: a key that is not text, a type that JSON does not have, or nesting without
            end; names the place.
    """
    if depth > _MAX_DEPTH:
        msg = f"{path[:80]}…: nested more than {_MAX_DEPTH} levels deep"
        raise ConfigError(msg)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                msg = f"{path}: the key {key!r} is not text"
                raise ConfigError(msg)
        return {key: plain_json(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    msg = f"{path}: a {type(value).__name__} cannot be written as JSON"
    raise ConfigError(msg)


def seal(
    kind: str,
    schema: int,
    body: Mapping[str, Any],
    encoded: Mapping[str, bytes] | None = None,
) -> bytes:
    """The bytes of a document.

    Args:
        kind: its ``format``.
        schema: its ``schema``.
        body: its other members.
        encoded: more members, in canonical bytes already (see :func:`canonical_json`). A big
            member that is the same in many documents is then encoded once.

    Raises:
        ConfigError: the body is not JSON.
    """
    members = {key: canonical_json(value) for key, value in body.items()}
    members |= {**(encoded or {}), "format": _dump(kind), "schema": _dump(schema)}
    members["sha256"] = _dump(hashlib.sha256(_join(members)).hexdigest())
    return _join(members)


def unseal(
    data: bytes, kind: str, schema: int, where: str, *, since: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The body of a document whose bytes verify.

    Args:
        data: arbitrary bytes.
        kind: the expected ``format``.
        schema: the newest ``schema`` this reader knows.
        where: the file's path, for the message.
        since: members that came later, with the schema that brought them.

    Raises:
        DamagedError: not JSON, another format, an unknown schema, a member that its schema does
            not have, or a hash that differs.
    """

    def refuse(reason: str) -> NoReturn:
        msg = f"{where}: {reason}"
        raise DamagedError(msg)

    try:
        document = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        refuse(f"not a {kind} document: {_brief(error)}")
    if not isinstance(document, dict) or document.get("format") != kind:
        refuse(f"not a {kind} document")
    found = document.get("schema")
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        refuse(f"schema version must be a positive integer, got {found!r}")
    if found > schema:
        refuse(
            f"{kind} schema {found} is newer than {schema}, the newest this version reads; "
            "upgrade the package to read it"
        )
    for member, first in (since or {}).items():
        if member in document and found < first:
            refuse(f"{member} is not a member of schema {found}")
    claimed = document.pop("sha256", None)
    try:
        # What the JSON reader made is plain, and every member is encoded once for both purposes.
        members = {key: _dump(value) for key, value in document.items()}
        computed = hashlib.sha256(_join(members)).hexdigest()
        canonical = _join({**members, "sha256": _dump(claimed)})
    except (ConfigError, RecursionError) as error:
        refuse(f"not a {kind} document: {_brief(error)}")
    if claimed != computed:
        refuse(f"damaged: its self-hash does not match (says {claimed!r}, is {computed})")
    if canonical != data:
        refuse("damaged: its bytes are not in canonical form")
    del document["format"], document["schema"]
    return document


def _brief(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}…"


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is not JSON"
    raise ValueError(msg)


def utc_now() -> str:
    """This moment as the documents write it: ``2026-01-31T12:00:00.123456Z``."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Fields:
    """Typed, strict access to the members of a JSON object from outside.

    Every getter raises DamagedError that names the document and the member; :meth:`done`
    refuses members that nobody asked for.
    """

    __slots__ = ("_index", "_members", "_name", "_parent", "_seen", "_where")

    def __init__(
        self,
        value: Any,
        where: str,
        parent: Fields | None = None,
        name: str = "",
        index: int | None = None,
    ) -> None:
        self._where = where
        # A document has thousands of objects; their paths are put together for errors alone.
        self._parent, self._name, self._index = parent, name, index
        if not isinstance(value, dict):
            self.refuse("", "must be an object", value)
        self._members: dict[str, Any] = value
        self._seen: set[str] = set()

    def refuse(self, name: str, rule: str, value: Any) -> NoReturn:
        """Raise DamagedError for a member."""
        shown = repr(value)
        member = self._path_of(name) or "document"
        msg = f"{self._where}: {member} {rule}, got {shown[:120]}"
        raise DamagedError(msg)

    def _path_of(self, name: str) -> str:
        """Where a member of this object stands in the document."""
        above = "" if self._parent is None else self._parent._path_of(self._name)
        own = above if self._index is None else f"{above}[{self._index}]"
        return ".".join(part for part in (own, name) if part)

    def raw(self, name: str) -> Any:
        """A member as it is; it must be there (null counts)."""
        if name not in self._members:
            msg = f"{self._where}: {self._path_of(name)} is missing"
            raise DamagedError(msg)
        self._seen.add(name)
        return self._members[name]

    def integer(self, name: str, low: int = 0, high: int = INT_MAX) -> int:
        """An integer from ``low`` to ``high``."""
        return self._as_integer(name, self.raw(name), low, high)

    def text(self, name: str, limit: int = 4096) -> str:
        """Text of at most ``limit`` characters."""
        value = self.raw(name)
        if not isinstance(value, str) or len(value) > limit:
            self.refuse(name, f"must be text of at most {limit} characters", value)
        return value

    def sha256(self, name: str) -> str:
        """64 lower-case hexadecimal digits."""
        value = self.raw(name)
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            self.refuse(name, "must be 64 hexadecimal digits", value)
        return value

    def path(self, name: str) -> str:
        """A relative path that stays below its root."""
        value = self.raw(name)
        problem = path_problem(value)
        if problem:
            self.refuse(name, f"must be a path inside the directory (this one {problem})", value)
        return str(value)

    def timestamp(self, name: str) -> str:
        """ISO 8601 date and time in UTC."""
        value = self.text(name, 64)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.refuse(name, "must be an ISO 8601 time in UTC", value)
        if moment.tzinfo is None or moment.utcoffset() != UTC.utcoffset(None):
            self.refuse(name, "must be an ISO 8601 time in UTC", value)
        return value

    def integers(self, name: str, low: int = 0, high: int = INT_MAX) -> tuple[int, ...]:
        """A list of integers from ``low`` to ``high``."""
        value = self.raw(name)
        if not isinstance(value, list):
            self.refuse(name, "must be a list of integers", value)
        for item in value:
            self._as_integer(name, item, low, high)
        return tuple(value)

    def json(self, name: str) -> dict[str, Any]:
        """An object, unchecked inside."""
        value = self.raw(name)
        if not isinstance(value, dict):
            self.refuse(name, "must be an object", value)
        return value

    def numbers(self, name: str, limit: int) -> dict[str, float]:
        """An object, not empty, of finite numbers with a fraction; names of 1 to ``limit``."""
        value = self.json(name)
        for key, item in value.items():
            if not 1 <= len(key) <= limit:
                self.refuse(name, f"must have names of 1 to {limit} characters", key)
            if type(item) is not float or not math.isfinite(item):
                self.refuse(f"{name}.{key}", "must be a finite number with a fraction", item)
        if not value:
            self.refuse(name, "must not be empty", value)
        return value

    def texts(self, name: str, limit: int = 4096) -> tuple[str, ...]:
        """A list, not empty, of texts of at most ``limit`` characters."""
        value = self.raw(name)
        if not isinstance(value, list) or not value:
            self.refuse(name, "must be a list of texts that is not empty", value)
        for item in value:
            if not isinstance(item, str) or len(item) > limit:
                self.refuse(name, f"must hold texts of at most {limit} characters", item)
        return tuple(value)

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        value = self.raw(name)
        if not isinstance(value, list):
            self.refuse(name, "must be a list of objects", value)
        return [Fields(item, self._where, self, name, index) for index, item in enumerate(value)]

    def optional(self, name: str, read: Callable[[str], T]) -> T | None:
        """None for null, else what ``read(name)`` gives."""
        return None if self.raw(name) is None else read(name)

    def child(self, name: str) -> Fields:
        """An object, to be read member by member."""
        return Fields(self.raw(name), self._where, self, name)

    def done(self) -> None:
        """Refuse members that were not read.

        Raises:
            DamagedError: there is one; names it.
        """
        if len(self._seen) < len(self._members):  # only members are ever noted as seen
            unknown = min(self._members.keys() - self._seen)
            self.refuse(unknown, "is not a member of this schema", self._members[unknown])

    def _as_integer(self, name: str, value: Any, low: int, high: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.refuse(name, f"must be an integer from {low} to {high}", value)
        return value
