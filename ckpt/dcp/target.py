"""A checkpoint id and the store behind it, opened when it is first needed."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any
from urllib.parse import urlsplit

from ckpt.errors import ConfigError
from ckpt.storage import Storage, open_storage
from ckpt.storage.redact import public_url


class Target:
    """Where a checkpoint lies. Pickles without its connection, for a process that saves.

    Args:
        url: a directory or a URL.
        options: for fsspec.

    Raises:
        ConfigError: the id is empty.
    """

    def __init__(self, url: str | PathLike[str], options: Mapping[str, Any] | None) -> None:
        self.url = fspath(url)
        if not isinstance(self.url, str) or not self.url:
            msg = f"a checkpoint id must be a directory or a URL, got {url!r}"
            raise ConfigError(msg)
        self._options = options
        self._storage: Storage | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_storage": None}

    def at(self, url: str | PathLike[str]) -> Target:
        """The same options at another id; this one if it is the same id."""
        return self if fspath(url) == self.url else Target(url, self._options)

    @property
    def shown(self) -> str:
        """The URL without credentials."""
        return public_url(self.url) if "://" in self.url else self.url

    @property
    def storage(self) -> Storage:
        """The store.

        Raises:
            ConfigError: an unusable URL or option.
            StorageError: the store cannot be reached.
        """
        if self._storage is None:
            self._storage = open_storage(self.url, self._options)
        return self._storage

    @staticmethod
    def known(url: str | PathLike[str]) -> bool:
        """Whether there is a store for the URL's scheme."""
        text = str(fspath(url))
        if "://" not in text:
            return bool(text)
        # Slow to import, and paths do not need it.
        import fsspec

        return urlsplit(text).scheme in fsspec.available_protocols()
