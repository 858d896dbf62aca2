"""Two local directories change places in one step."""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any, Final

from ckpt.errors import StorageError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NOT_THERE: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


@cache
def _renameat2() -> Any | None:
    """The C library's ``renameat2`` (Linux 3.15, glibc 2.28), or None."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = (
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_int,
        ctypes.c_char_p,
        ctypes.c_uint,
    )
    function.restype = ctypes.c_int
    return function


def exchange_dirs(new: Path, old: Path) -> None:
    """Make ``old`` name what ``new`` names, and the other way round; durable on return.

    Where kernel or file system cannot exchange, two renames do it: then a reader may, for an
    instant, find neither under the name ``old``, but never a mixture.

    Args:
        new: the replacement, in the same directory as ``old``.
        old: the directory that readers know.

    Raises:
        StorageError: a rename failed; ``old`` still names one of the two.
    """
    function = _renameat2()
    swapped = False
    if function is not None:
        result = function(
            _AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE
        )
        swapped = result == 0
        code = ctypes.get_errno()
        if not swapped and code not in _NOT_THERE:
            raise StorageError(f"cannot replace {old}: {os.strerror(code)}")
    try:
        if not swapped:
            _rename_twice(new, old)
        _fsync_dir(old.parent)
    except OSError as error:
        raise StorageError(f"cannot replace {old}: {error.strerror}") from error


def _rename_twice(new: Path, old: Path) -> None:
    aside = new.with_name(f"{new.name}.aside")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def _fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
