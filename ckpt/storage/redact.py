"""Take credentials out of texts before they reach a message or a log."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

_USERINFO = re.compile(r"(?<=://)[^/\s@'\"]*@")
_QUERY = re.compile(r"(?<=\?)[^\s'\"<>]+")
_HARMLESS = frozenset(
    {
        "account_name",
        "addressing_style",
        "endpoint_url",
        "profile",
        "profile_name",
        "project",
        "region_name",
        "request_checksum_calculation",
        "response_checksum_validation",
        "signature_version",
        "upload_checksum",
    }
)
"""Options that name a place, a person or a manner, not a secret; messages need them."""
_SECRET_KEY = re.compile(r"secret|passw|token|key|sas|credential", re.IGNORECASE)
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")
_SHORTEST = 8
"""Shorter values of an option that is not a secret by name would blot out ordinary words."""


def public_url(url: str) -> str:
    """A URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")


class Redactor:
    """Knows the secrets of one store and blots them out.

    Args:
        options: the store's options; every text in them counts as a secret unless its key is
            one of a few harmless ones. The AWS variables of the environment count too.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        found = {text for text in _texts(options) if text}
        found.update(filter(None, (os.environ.get(name) for name in _SECRET_VARIABLES)))
        # Longest first: a secret that contains another one goes as a whole.
        self._secrets = sorted(found, key=len, reverse=True)

    def __repr__(self) -> str:
        return f"Redactor({len(self._secrets)} secrets)"

    def __call__(self, text: str) -> str:
        """The text without secrets, user information in URLs, and URL queries."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _QUERY.sub("***", _USERINFO.sub("***@", text))


def _texts(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, str(name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif (
        isinstance(value, str)
        and key not in _HARMLESS
        and (len(value) >= _SHORTEST or _SECRET_KEY.search(key))
    ):
        yield value
