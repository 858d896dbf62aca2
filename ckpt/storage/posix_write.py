"""How bytes get into a file that is fsynced afterwards: in large calls, and early to the disk."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from .faultpoints import hit

CALL_BYTES: Final = 16 * 1024 * 1024
"""Most bytes of one call: enough to keep the interpreter out of the way, and little enough that
the disk has something to do soon."""
DIRECT_BYTES: Final = 16 * 1024 * 1024
"""From this size on, memory that begins at a page goes to the disk without the page cache. Copying
it there takes several times as much of the processor, which trains meanwhile, and more if
the kernel has to find fresh memory for it."""
PAGE: Final = 4096
"""Direct writes want memory, position and length at multiples of the disk's block, at most this."""
_VECTOR: Final = 512
"""Buffers per call; the kernel's limit is 1024."""
_SYNC_FILE_RANGE_WRITE: Final = 2


def write_all(fd: int, views: Sequence[memoryview], *, eager: bool = True) -> None:
    """Write every byte of the views, in few calls.

    ``eager`` sends them on their way to the disk at once, for a sync that follows.
    """
    size = sum(map(len, views))
    file = _File(fd, eager=eager, direct=eager and size >= DIRECT_BYTES)
    # At least two calls, so that every file has a middle where a test may have something happen.
    limit = max(1, size // 2)
    if len(views) == 1 and size >= DIRECT_BYTES:
        whole = size - size % PAGE  # only the last piece of a page goes through the page cache
        calls = _calls([views[0][:whole]], limit - limit % PAGE) + _calls([views[0][whole:]], PAGE)
    else:
        calls = _calls(views, limit)
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
        direct: pass by the page cache where memory, position and file system allow it.
    """

    def __init__(self, fd: int, *, eager: bool, direct: bool = False) -> None:
        self._fd, self._eager = fd, eager
        self._may_direct = direct and _O_DIRECT != 0
        self._is_direct = False
        self._written = 0
        self._begun = 0

    def write(self, pieces: Sequence[memoryview]) -> None:
        """Append the pieces, all of them."""
        rest = list(pieces)
        while rest:
            self._switch(rest)
            try:
                written = os.writev(self._fd, rest)
            except OSError as error:
                if not self._is_direct or error.errno != errno.EINVAL:
                    raise
                self._may_direct = False  # a file system with other wants; nothing was written
                continue
            self._written += written
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]
        if self._written - self._begun >= CALL_BYTES:
            if self._eager and not self._is_direct and _sync_file_range is not None:
                # A hint: whether the bytes arrive is the fsync's to say.
                length = self._written - self._begun
                _sync_file_range(self._fd, self._begun, length, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._written

    def _switch(self, pieces: Sequence[memoryview]) -> None:
        """Write the pieces directly from now on if that can be, or through the page cache."""
        wanted = (
            self._may_direct
            and self._written % PAGE == 0
            and all(len(piece) % PAGE == 0 and _at_page(piece) for piece in pieces)
        )
        if wanted == self._is_direct:
            return
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~_O_DIRECT
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | (_O_DIRECT if wanted else 0))
        except OSError as error:
            if not wanted or error.errno != errno.EINVAL:
                raise
            self._may_direct = False  # as memory file systems answer
        else:
            self._is_direct = wanted


def _at_page(view: memoryview) -> bool:
    """Whether the view's memory begins at a page; that of read-only views is not looked up."""
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % PAGE == 0


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    """Linux's sync_file_range(2), which Python does not offer; None on other systems."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function.restype = ctypes.c_int
    call: Callable[[int, int, int, int], int] = function
    return call


_O_DIRECT: Final = getattr(os, "O_DIRECT", 0)
"""0 on systems that have no such thing."""
_sync_file_range = _find_sync_file_range()
