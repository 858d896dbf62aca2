"""Advisory locks on files: the system gives one up when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from pathlib import Path
from typing import Self

_held: weakref.WeakSet[FileLock] = weakref.WeakSet()


class FileLock:
    """A held lock; a forked child does not keep it alive after its parent's death.

    Made by :meth:`take`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        _held.add(self)

    @classmethod
    def take(cls, path: Path, *, shared: bool = False, wait: bool = False) -> Self | None:
        """Lock a file, which is made if need be.

        Args:
            path: the file; its directory exists.
            shared: several holders may share it.
            wait: wait for it; otherwise None is returned if somebody else holds it.

        Raises:
            OSError: the file cannot be opened.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor)

    def release(self) -> None:
        """Give the lock up."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # closed behind our back: then it is given up
                os.close(descriptor)


def _let_go() -> None:
    """In a forked child: the lock is its parent's alone."""
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go)
