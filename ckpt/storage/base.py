"""The one protocol behind which every store lies.

Paths are relative to the store's root, ``/``-separated, and never leave it. Every method
blocks until the effect is durable (POSIX: fsynced) or acknowledged (object stores), and
raises :class:`~ckpt.errors.StorageError` (or a child) and nothing else for what the store does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeAlias, runtime_checkable

from .traffic import Traffic

ONE_PUT_BYTES: Final = 128 * 1024 * 1024
"""Up to here an object is written by one request, so that an adapter is."""

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes; a memoryview must have format ``B``."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One immediate child of a directory or prefix (size in bytes, 0 for directories)."""

    name: str
    is_dir: bool
    size: int


@runtime_checkable
class Storage(Protocol):
    """Blocking, thread-safe access to one root."""

    @property
    def url(self) -> str:
        """The root, fit for a message: credentials and queries are removed."""
        ...

    @property
    def has_rename(self) -> bool:
        """True where a directory can be made visible by one atomic rename (POSIX)."""
        ...

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes since this object was made; never reset."""
        ...

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` of a file; a short file is a :class:`StorageError`."""
        ...

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with a file's bytes from ``start`` on, copying as little as possible."""
        ...

    def size(self, path: str) -> int:
        """Size of a file in bytes; :class:`ObjectNotFound` if there is none."""
        ...

    def exists(self, path: str) -> bool:
        """Whether a file (not a directory) lies at the path."""
        ...

    def list(self, path: str) -> list[Entry]:
        """Immediate children, sorted by name; a missing directory is empty."""
        ...

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole file, all of it or nothing visible; parents are made; replaces."""
        ...

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write a whole file of ``size`` bytes from buffers that are made as they are asked for.

        Like :meth:`put`, but memory stays bounded: no more than a part of an upload is held, and
        the iterable is consumed once. An exception from it passes through unchanged; then, and
        when the buffers do not add up to ``size`` (:class:`StorageError`), nothing is visible.
        """
        ...

    def put_new(self, path: str, data: Buffer) -> None:
        """Exclusive create: exactly one of many concurrent callers succeeds.

        Raises:
            AlreadyExists: the name is taken by somebody else's bytes.
            CommitUnknown: the answer was lost and reading back failed.
        """
        ...

    def delete(self, path: str) -> None:
        """Delete a file; one that is missing already is fine."""
        ...

    def delete_tree(self, path: str) -> None:
        """Delete everything below a directory or prefix, and itself."""
        ...

    def rename_dir(self, source: str, target: str) -> None:
        """Move a directory in one step and fsync both parents (only with ``has_rename``).

        Raises:
            AlreadyExists: the target exists.
        """
        ...

    def local_path(self, path: str) -> Path | None:
        """The path on this machine's file system, or None where there is none."""
        ...

    def close(self) -> None:
        """Release connections; a later call opens new ones."""
        ...


@runtime_checkable
class Announcing(Protocol):
    """A store that knows by itself which version of the root is the newest."""

    def newest(self, run_name: str | None) -> bytes | None:
        """The sealed manifest of the newest whole version, or None if there is none."""
        ...

    def newer(self, run_name: str | None, number: int, wait_s: float) -> bytes | None:
        """That of the newest version above a number, as soon as there is one; None in the end."""
        ...


@runtime_checkable
class Holding(Protocol):
    """A store that takes leases and pins itself, because nobody writes its files from here."""

    def take_lease(self, version: str, holder: str, ttl_s: float) -> tuple[str, str]:
        """Take or renew a lease; when it was renewed and until when it holds."""
        ...

    def release_lease(self, version: str, holder: str) -> None:
        """Give a lease back; one that is not held is fine."""
        ...

    def put_pin(self, name: str, note: str) -> tuple[str, str]:
        """Pin a step or version; on which machine and when that was recorded."""
        ...

    def delete_pin(self, name: str) -> bool:
        """Take a pin away; whether there was one."""
        ...


@runtime_checkable
class Presigning(Protocol):
    """A store whose files can be read by whoever is given a URL."""

    def presigned_url(self, path: str, expires_s: int) -> str:
        """A URL with which anybody may read a file, for so many seconds; it is a secret."""
        ...
