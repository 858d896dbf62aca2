"""How bytes get into a file that is fsynced afterwards: in large calls, and early to the disk."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .faultpoints import hit

CALL_BYTES: Final = 16 * 1024 * 1024
"""Most bytes of one call: enough to keep the interpreter out of the way, and little enough that
the disk has something to do soon."""
_VECTOR: Final = 512
"""Buffers per call; the kernel's limit is 1024."""
_SYNC_FILE_RANGE_WRITE: Final = 2


def write_all(fd: int, views: Sequence[memoryview], *, eager: bool = True) -> None:
    """Write every byte of the views, in few calls.

    ``eager`` sends them on their way to the disk at once, for a sync that follows.
    """
    file = _File(fd, eager=eager)
    # At least two calls, so that every file has a middle where a test may have something happen.
    calls = _calls(views, max(1, sum(map(len, views)) // 2))
    half = len(calls) // 2
    for call in calls[:half]:
        file.write(call)
    hit("posix.put.mid_write")
    for call in calls[half:]:
        file.write(call)


def write_stream(fd: int, views: Iterable[memoryview], *, eager: bool = True) -> None:
    """Write views as they are made; each has been written when the next one is asked for."""
    file = _File(fd, eager=eager)
    for view in views:
        for call in _calls([view], CALL_BYTES):
            file.write(call)
        hit("posix.put.mid_write")


def _calls(views: Sequence[memoryview], limit: int) -> list[list[memoryview]]:
    """The views, cut and grouped into what one call writes: ``limit`` bytes at most."""
    limit = min(CALL_BYTES, limit)
    calls: list[list[memoryview]] = []
    room = 0
    for view in views:
        rest = view
        while len(rest):
            if not room or len(calls[-1]) == _VECTOR:
                calls.append([])
                room = limit
            calls[-1].append(rest[:room])
            room, rest = room - len(calls[-1][-1]), rest[room:]
    return calls


class _File:
    """A file whose bytes begin their way to the disk while later ones are still being written.

    Left to itself the kernel keeps them in memory until the fsync, so that first the processor
    waits for nothing and then the disk is waited for.

    Args:
        fd: a descriptor at position 0.
        eager: False leaves them to the kernel, where nobody will wait for the disk.
    """

    def __init__(self, fd: int, *, eager: bool) -> None:
        self._fd, self._eager = fd, eager
        self._written = 0
        self._begun = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Append the pieces, all of them."""
        rest = list(pieces)
        while rest:
            written = os.writev(self._fd, rest)
            self._written += written
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]
        if self._written - self._begun >= CALL_BYTES:
            if self._eager and _sync_file_range is not None:
                # A hint: whether the bytes arrive is the fsync's to say.
                length = self._written - self._begun
                _sync_file_range(self._fd, self._begun, length, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._written


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range(2), which Python does not offer; None on other systems."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    call: Callable[[int, int, int, int], int] = function
    return call


_sync_file_range = _find_sync_file_range()
