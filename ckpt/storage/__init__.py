"""Stores: one protocol, POSIX and fsspec behind it."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any
from urllib.parse import unquote, urlsplit

from ckpt.errors import ConfigError

from .base import Announcing, Buffer, Entry, Holding, Presigning, Storage
from .checked import put_checked, read_checked, verified_blocks
from .posix import PosixStorage
from .traffic import Traffic

__all__ = [
    "Announcing",
    "Buffer",
    "Entry",
    "Holding",
    "Presigning",
    "Storage",
    "Traffic",
    "open_storage",
    "put_checked",
    "read_checked",
    "verified_blocks",
]

_BACKENDS = ("s3fs", "obstore")
"""Who moves the bytes of an S3 store; the first is the default."""


def open_storage(
    url: str | PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Storage:
    """The store behind a path or URL.

    Args:
        url: a plain path or ``file://`` URL (POSIX), or any URL that fsspec knows, for example
            ``s3://bucket/prefix`` or ``memory://name``; or the address of a service,
            ``https://host:8080/runs/run7``, behind which a root is read.
        storage_options: passed to fsspec; not allowed for paths. For S3, ``backend`` is
            ``"s3fs"`` (default) or ``"obstore"`` (extra ``[obstore]``).

    Raises:
        ConfigError: an unusable URL, or options where none are taken.
        StorageError: the store cannot be reached.
    """
    text = fspath(url)
    scheme = urlsplit(text).scheme if "://" in text else ""
    if scheme in {"", "file"}:
        if storage_options:
            msg = f"storage_options are for object stores, not for the path {text!r}"
            raise ConfigError(msg)
        if scheme:
            parts = urlsplit(text)
            if parts.netloc not in {"", "localhost"}:
                msg = f"{text!r} names a file on another machine; write file:///path"
                raise ConfigError(msg)
            text = unquote(parts.path)
        if not text:
            msg = "the path of a store is empty"
            raise ConfigError(msg)
        return PosixStorage(text)
    options = dict(storage_options or {})
    # fsspec and s3fs are slow to import, and a run on local disks needs neither.
    if scheme in {"s3", "s3a"}:
        backend = options.pop("backend", _BACKENDS[0])
        if backend not in _BACKENDS:
            msg = f"backend must be one of {_BACKENDS}, got {backend!r}"
            raise ConfigError(msg)
        if backend == "obstore":
            from .s3_obstore import ObstoreStorage

            return ObstoreStorage(text, options)
        from .s3 import S3Storage

        return S3Storage(text, options)
    if scheme in {"http", "https"}:
        return _served(text, options)
    from .fsspec_store import FsspecStorage

    return FsspecStorage(text, options)


def _served(url: str, options: Mapping[str, Any]) -> Storage:
    """A root behind a service; needs httpx, which no other store does."""
    try:
        from .http_store import ServedStorage
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        msg = "a root behind a service needs httpx: pip install 'archon-lora[client]'"
        raise ConfigError(msg) from None
    return ServedStorage(url, options)
