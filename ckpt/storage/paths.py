"""Checks on what callers hand to a store: relative paths, buffers, streams of buffers."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator

from ckpt.errors import StorageError
from ckpt.layout import path_problem

from .base import Buffer


class SourceFailed(Exception):
    """Carries an exception of the caller's own iterable past a store's error translation."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


def checked_path(path: str, *, root_allowed: bool = False) -> str:
    """The path itself, if it stays below the root.

    Args:
        path: relative, ``/``-separated.
        root_allowed: accept ``""``, the root itself.

    Raises:
        StorageError: it is empty, absolute, leaves the root, or holds odd characters.
    """
    if root_allowed and path == "":
        return path
    problem = path_problem(path)
    if problem:
        msg = f"{path!r} {problem}; paths are relative to the store's root and stay below it"
        raise StorageError(msg)
    return path


def as_views(data: object) -> list[memoryview]:
    """The buffers of a ``put``, as flat, non-empty byte views.

    Raises:
        StorageError: something that is not contiguous bytes.
    """
    buffers = [data] if isinstance(data, bytes | bytearray | memoryview) else data
    views: list[memoryview] = []
    if not isinstance(buffers, list | tuple):
        msg = f"data must be bytes or a sequence of buffers, got {type(data).__name__}"
        raise StorageError(msg)
    for buffer in buffers:
        try:
            view = memoryview(buffer).cast("B")
        except TypeError as error:
            msg = f"data must be contiguous bytes: {error}"
            raise StorageError(msg) from None
        if view.nbytes:
            views.append(view)
    return views


def sized_views(chunks: Iterable[Buffer], size: int, where: str) -> Iterator[memoryview]:
    """The buffers of a stream as views, checked to be ``size`` bytes in all.

    Raises:
        SourceFailed: the iterable raised; the caller re-raises its cause.
        StorageError: too many or too few bytes.
    """
    total = 0
    source = iter(chunks)
    while True:
        try:
            chunk = next(source)
        except StopIteration:
            break
        except Exception as error:
            raise SourceFailed(error) from error
        for view in as_views(chunk):
            total += len(view)
            if total > size:
                break
            yield view
        if total > size:
            break
    if total != size:
        amount = f"more than {size}" if total > size else f"{total} of {size}"
        msg = f"{where}: the stream gave {amount} bytes; nothing was written"
        raise StorageError(msg)


def collect(views: Iterable[memoryview]) -> bytes:
    """The bytes of a stream, each view copied before the next one is asked for."""
    body = io.BytesIO()
    for view in views:
        body.write(view)
    return body.getvalue()  # without another copy
