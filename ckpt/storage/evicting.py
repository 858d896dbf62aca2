"""A POSIX directory that makes room for what is written, instead of failing at once when full."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from ckpt.errors import StorageError

from .base import Buffer
from .paths import as_views
from .posix import PosixStorage

FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""What the system says when a file system, or the share of a user in it, is full."""


class EvictingStorage(PosixStorage):
    """Like :class:`PosixStorage`; a write that finds no space has something deleted and goes on.

    Args:
        root: the directory.
        evict: frees space by deleting one thing that may go, and says whether it did. It raises
            nothing; when it returns False the write fails.
        explain: why nothing more may go, for the error's message.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        evict: Callable[[], bool],
        explain: Callable[[], str],
    ) -> None:
        super().__init__(root)
        self._evict = evict
        self._explain = explain

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole file; as long as there is no space for it, make some.

        Raises:
            StorageError: it is full (``errno`` says so) of what may not go, or the write failed.
        """
        views = as_views(data)
        while True:
            try:
                super().put(path, views)
            except StorageError as error:
                self._make_room(error)
            else:
                return

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write a whole file from a stream, which cannot be repeated: room is made beforehand."""
        while self._free() < size and self._evict():
            pass
        try:
            super().put_stream(path, chunks, size)
        except StorageError as error:
            if error.errno in FULL:
                raise self._full(error) from error
            raise

    def _free(self) -> int:
        """Bytes that an unprivileged writer may still use."""
        place = self._root
        while not place.exists():
            place = place.parent
        status = os.statvfs(place)
        return status.f_bavail * status.f_frsize

    def _make_room(self, error: StorageError) -> None:
        if error.errno not in FULL:
            raise error
        if not self._evict():
            raise self._full(error) from error

    def _full(self, error: StorageError) -> StorageError:
        full = StorageError(f"{error}; {self._explain()}")
        full.errno = error.errno
        return full
