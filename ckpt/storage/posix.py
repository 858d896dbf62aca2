"""A directory on a POSIX file system: durable writes, atomic replace, exclusive create.

A file is written under a temporary name, fsynced and renamed (or, for an exclusive create,
hard-linked), and its directory is fsynced: after a crash at any point a name shows the whole
old content, the whole new content, or nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from ckpt.errors import AlreadyExists, ConfigError, ObjectNotFound, StorageError
from ckpt.layout import TMP_PREFIX

from .base import Buffer, Entry
from .faultpoints import hit
from .paths import SourceFailed, as_views, checked_path, sized_views
from .posix_write import write_all, write_stream
from .traffic import Meter, Traffic

_READ_BYTES = 512 * 1024 * 1024
"""Largest single read."""
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}
"""What link() answers on file systems without hard links."""


class PosixStorage:
    """Storage below one directory, which need not exist until something is written.

    Args:
        root: the directory. Symbolic links below it are followed only while they stay below it.
        durable: sync what is written. Without it a name may show anything after the machine went
            down; a process that ends, however it does, still leaves all or nothing.

    Raises:
        ConfigError: the path exists and is not a directory.
    """

    def __init__(self, root: str | os.PathLike[str], *, durable: bool = True) -> None:
        self._root = Path(os.path.realpath(Path(root).expanduser()))
        if self._root.exists() and not self._root.is_dir():
            msg = f"{self._root} is a file; the root of a store must be a directory"
            raise ConfigError(msg)
        self._meter = Meter()
        self._durable = durable

    def __repr__(self) -> str:
        return f"PosixStorage({str(self._root)!r})"

    @property
    def url(self) -> str:
        """The root directory."""
        return str(self._root)

    @property
    def has_rename(self) -> bool:
        """Always true."""
        return True

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes so far."""
        return self._meter.read()

    def local_path(self, path: str) -> Path | None:
        """Where a file or directory lies."""
        return self._locate(path, root_allowed=True)

    def close(self) -> None:
        """Nothing is held between calls."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` of a file."""
        with self._reading(path) as (fd, size):
            stop = self._range(path, start, size if end is None else end, size)
            self._meter.add(received=stop - start)
            pieces = []
            while start < stop:
                piece = os.pread(fd, min(stop - start, _READ_BYTES), start)
                if not piece:
                    self._short(path, stop, start)
                pieces.append(piece)
                start += len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with the bytes of a file from ``start`` on, without a copy."""
        view = target.cast("B")
        with self._reading(path) as (fd, size):
            stop = self._range(path, start, start + len(view), size)
            self._meter.add(received=len(view))
            done = 0
            while start + done < stop:
                count = os.preadv(fd, [view[done : done + _READ_BYTES]], start + done)
                if not count:
                    self._short(path, stop, start + done)
                done += count

    def size(self, path: str) -> int:
        """Size of a file in bytes."""
        with self._errors("stat", path):
            status = self._locate(path).stat()
        if not stat.S_ISREG(status.st_mode):
            msg = f"{self._show(path)}: not a file"
            raise ObjectNotFound(msg)
        return status.st_size

    def exists(self, path: str) -> bool:
        """Whether a file lies at the path."""
        try:
            self.size(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, path: str) -> list[Entry]:
        """Immediate children, sorted by name; links are listed as what they are: not followed."""
        entries = []
        try:
            with (
                self._errors("list", path),
                os.scandir(self._locate(path, root_allowed=True)) as it,
            ):
                for item in it:
                    is_dir = item.is_dir(follow_symlinks=False)
                    try:
                        size = 0 if is_dir else item.stat(follow_symlinks=False).st_size
                    except FileNotFoundError:
                        continue  # deleted between the listing and the look at it
                    entries.append(Entry(item.name, is_dir, size))
        except ObjectNotFound:
            return []
        return sorted(entries, key=lambda entry: entry.name)

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole file and make it durable; replaces."""
        target = self._locate(path)
        views = as_views(data)
        with self._errors("write", path):
            self._make_dirs(target.parent)
            self._replace(target, lambda fd: write_all(fd, views, eager=self._durable))
            self._meter.add(sent=sum(map(len, views)))

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write a whole file from buffers as they are made; replaces."""
        target = self._locate(path)
        try:
            with self._errors("write", path):
                self._make_dirs(target.parent)
                views = sized_views(chunks, size, self._show(path))
                self._replace(target, lambda fd: write_stream(fd, views, eager=self._durable))
                self._meter.add(sent=size)
        except SourceFailed as failed:
            raise failed.cause from None

    def put_new(self, path: str, data: Buffer) -> None:
        """Exclusive create through a hard link: the name appears with its whole content."""
        target = self._locate(path)
        views = as_views(data)
        with self._errors("create", path):
            self._make_dirs(target.parent)
            with self._temporary(
                target, lambda fd: write_all(fd, views, eager=self._durable)
            ) as temporary:
                hit("posix.put_new.before_link")
                self._link(temporary, target, views, path)
                hit("posix.put_new.after_link")
            self._sync_dir(target.parent)
            self._meter.add(sent=sum(map(len, views)))

    def delete(self, path: str) -> None:
        """Delete a file; a missing one is fine."""
        target = self._locate(path, follow=False)
        try:
            with self._errors("delete", path):
                target.unlink()
                self._sync_dir(target.parent)
        except ObjectNotFound:
            return

    def delete_tree(self, path: str) -> None:
        """Delete a directory and what is below it; links are deleted, not followed."""
        target = self._locate(path, follow=False)
        try:
            with self._errors("delete", path):
                shutil.rmtree(target)
                self._sync_dir(target.parent)
        except ObjectNotFound:
            return

    def rename_dir(self, source: str, target: str) -> None:
        """Move a directory in one step and fsync both parents."""
        old, new = self._locate(source, follow=False), self._locate(target, follow=False)
        with self._errors("rename", source):
            self._make_dirs(new.parent)
            # rename() would silently replace an empty directory.
            if os.path.lexists(new):
                self._taken(target)
            hit("posix.rename_dir.before")
            try:
                old.rename(new)
            except OSError as error:
                if error.errno in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                    self._taken(target)
                raise
            hit("posix.rename_dir.after")
            self._sync_dir(new.parent)
            if old.parent != new.parent:
                self._sync_dir(old.parent)

    def _show(self, path: str) -> str:
        return f"{self._root}/{path}" if path else str(self._root)

    def _taken(self, path: str) -> NoReturn:
        msg = f"{self._show(path)} exists already"
        raise AlreadyExists(msg)

    def _short(self, path: str, wanted: int, got: int) -> NoReturn:
        msg = f"{self._show(path)}: too short: wanted bytes up to {wanted}, the file ends at {got}"
        raise StorageError(msg)

    def _range(self, path: str, start: int, end: int, size: int) -> int:
        if not 0 <= start <= end:
            msg = f"{self._show(path)}: {start} to {end} is not a range of bytes"
            raise StorageError(msg)
        if end > size:
            self._short(path, end, size)
        return end

    def _locate(self, path: str, *, root_allowed: bool = False, follow: bool = True) -> Path:
        """The place of a relative path, links resolved and still below the root.

        Args:
            path: relative path.
            root_allowed: accept the root itself.
            follow: resolve the last component too (never for what deletes or renames).
        """
        joined = self._root / checked_path(path, root_allowed=root_allowed)
        if follow:
            resolved = Path(os.path.realpath(joined))
        else:
            resolved = Path(os.path.realpath(joined.parent)) / joined.name
        if resolved != self._root and self._root not in resolved.parents:
            msg = f"{self._show(path)}: a symbolic link leads out of {self._root}"
            raise StorageError(msg)
        return resolved

    @contextlib.contextmanager
    def _errors(self, action: str, path: str) -> Iterator[None]:
        """Turn what the system raises into this package's errors, with the path and the cause."""
        self._meter.add(requests=1)
        try:
            yield
        except StorageError:
            raise
        except OSError as error:
            msg = f"{self._show(path)}: {action} failed: {error.strerror or error}"
            kind = ObjectNotFound if error.errno in {errno.ENOENT, errno.ENOTDIR} else StorageError
            wrapped = kind(msg)
            wrapped.errno = error.errno
            raise wrapped from error

    @contextlib.contextmanager
    def _reading(self, path: str) -> Iterator[tuple[int, int]]:
        """A descriptor of a regular file and its size."""
        with self._errors("read", path):
            fd = os.open(self._locate(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    msg = f"{self._show(path)}: not a file"
                    raise ObjectNotFound(msg)
                yield fd, status.st_size
            finally:
                os.close(fd)

    def _make_dirs(self, directory: Path) -> None:
        """Make a directory and its parents durable; only what is missing costs an fsync."""
        missing = []
        while not directory.is_dir():
            missing.append(directory)
            directory = directory.parent
        for new in reversed(missing):
            new.mkdir(exist_ok=True)
            self._sync_dir(new.parent)

    def _replace(self, target: Path, fill: Callable[[int], None]) -> None:
        with self._temporary(target, fill) as temporary:
            hit("posix.put.before_rename")
            temporary.replace(target)
            hit("posix.put.after_rename")
        self._sync_dir(target.parent)

    @contextlib.contextmanager
    def _temporary(self, target: Path, fill: Callable[[int], None]) -> Iterator[Path]:
        """A durable file with the content beside the target; gone again on the way out."""
        suffix = target.name.encode()[:150].decode(errors="ignore")
        temporary = target.parent / f"{TMP_PREFIX}{uuid.uuid4().hex}-{suffix}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o666)
        try:
            try:
                hit("posix.put.before_write")
                fill(fd)
                hit("posix.put.after_write")
                if self._durable:
                    os.fsync(fd)
                hit("posix.put.after_fsync")
            finally:
                os.close(fd)
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):  # renamed: the good case
                temporary.unlink()

    def _link(self, temporary: Path, target: Path, views: Sequence[memoryview], path: str) -> None:
        try:
            os.link(temporary, target, follow_symlinks=False)
        except FileExistsError:
            # A network file system may repeat a request whose answer was lost.
            if temporary.stat().st_nlink < 2:
                self._taken(path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._create_in_place(target, views, path)

    def _create_in_place(self, target: Path, views: Sequence[memoryview], path: str) -> None:
        """Exclusive create without hard links; a crash may leave a torn file that cannot verify."""
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            self._taken(path)
        try:
            write_all(fd, views, eager=self._durable)
            if self._durable:
                os.fsync(fd)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _sync_dir(self, directory: Path) -> None:
        """Make the names in a directory durable."""
        if not self._durable:
            return
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
