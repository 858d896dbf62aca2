"""Any other fsspec URL: ``memory://``, ``gs://``, ``az://``, ...

Only whole-object calls are used, never an open file that would publish a part on error. Retries
are the file system's own.
"""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import fsspec

from ckpt.errors import (
    AlreadyExists,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StoreNotExclusive,
)

from .base import Buffer, Entry
from .faultpoints import hit
from .paths import SourceFailed, as_views, checked_path, sized_views
from .redact import Redactor, public_url
from .traffic import Meter, Traffic

T = TypeVar("T")

_EXCLUSIVE = frozenset({"memory", "gs", "gcs", "az", "abfs", "abfss"})
"""Protocols whose ``pipe_file(mode="create")`` is one atomic, conditional request."""

_memory_lock = threading.Lock()
"""fsspec's memory store checks and creates in two steps; all of a process shares it."""


class FsspecStorage:
    """Storage below an fsspec URL.

    Args:
        url: the root.
        options: keyword arguments of the file system's class.

    Raises:
        ConfigError: an unknown protocol, a missing package, a chained or queried URL, bad options.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._source = url
        self._options = dict(options)
        self._redact = Redactor(self._options)
        if "::" in url or "?" in url or "#" in url:
            msg = f"the root must be a plain URL without '::', '?' and '#', got {public_url(url)!r}"
            raise ConfigError(msg)
        self._protocol = urlsplit(url).scheme
        self._url = public_url(url)
        self._pid = os.getpid()
        self._fs, self._root = self._connect()
        self._exclusive = False
        self._meter = Meter()

    def __repr__(self) -> str:
        return f"FsspecStorage({self._url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections do not travel to another process; the settings do."""
        return FsspecStorage, (self._source, self._options)

    @property
    def url(self) -> str:
        """The root, without user and password."""
        return self._url

    @property
    def has_rename(self) -> bool:
        """Never: object stores copy and delete."""
        return False

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes so far."""
        return self._meter.read()

    def local_path(self, path: str) -> Path | None:
        """None."""
        return None

    def close(self) -> None:
        """The file system closes itself when it is collected."""

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``[start, end)`` of an object."""
        if end is not None and not 0 <= start <= end:
            msg = f"{self._show(path)}: {start} to {end} is not a range of bytes"
            raise StorageError(msg)
        if end == start:
            size = self.size(path)
            data = b""
            got = min(start, size)
        else:
            data = self._do("read", path, lambda fs, at: bytes(fs.cat_file(at, start, end)))
            got = start + len(data)
            self._meter.add(received=len(data))
        if end is not None and got != end:
            msg = f"{self._show(path)}: too short: wanted bytes up to {end}, the file ends at {got}"
            raise StorageError(msg)
        return data

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target``."""
        view = target.cast("B")
        view[:] = self.read(path, start, start + len(view))

    def size(self, path: str) -> int:
        """Size of an object in bytes."""
        info = self._do("stat", path, lambda fs, at: fs.info(at))
        if info["type"] != "file":
            msg = f"{self._show(path)}: not a file"
            raise ObjectNotFound(msg)
        return int(info["size"])

    def exists(self, path: str) -> bool:
        """Whether an object lies at the path."""
        try:
            self.size(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, path: str) -> list[Entry]:
        """Immediate children below a prefix, sorted by name."""
        checked_path(path, root_allowed=True)
        try:
            infos = self._do("list", path, lambda fs, at: fs.ls(at, detail=True))
        except ObjectNotFound:
            return []
        here = self._at(path).strip("/")
        entries = {}
        for info in infos:
            name = info["name"].rstrip("/")
            if name.strip("/") == here:
                continue  # some file systems list the prefix's own marker
            is_dir = info["type"] == "directory"
            short = name.rpartition("/")[2]
            entries[short] = Entry(short, is_dir, 0 if is_dir else int(info["size"] or 0))
        return sorted(entries.values(), key=lambda entry: entry.name)

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole object."""
        body = data if isinstance(data, bytes) else b"".join(as_views(data))

        def write(fs: Any, at: str) -> None:
            hit("object.put.before")
            self._meter.add(sent=len(body))
            fs.pipe_file(at, body)
            hit("object.put.after")

        self._do("write", path, write)

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write a whole object from buffers as they are made, over a temporary file."""
        checked_path(path)
        try:
            with tempfile.NamedTemporaryFile(prefix="ckpt-upload-") as spool:
                for view in sized_views(chunks, size, self._show(path)):
                    spool.write(view)
                spool.flush()
                self._meter.add(sent=size)
                self._do("write", path, lambda fs, at: fs.put_file(spool.name, at))
        except SourceFailed as failed:
            raise failed.cause from None
        except StorageError:
            raise
        except OSError as error:
            msg = f"{self._show(path)}: cannot spool the upload: {error.strerror or error}"
            raise StorageError(msg) from error

    def put_new(self, path: str, data: Buffer) -> None:
        """Exclusive create, where the file system has one.

        Raises:
            AlreadyExists: the name is taken.
            StoreNotExclusive: it has none.
        """
        checked_path(path)
        if not self._exclusive:
            self._probe()
            self._exclusive = True
        body = bytes(data)

        def create(fs: Any, at: str) -> None:
            hit("object.put_new.before")
            self._meter.add(sent=len(body))
            self._create(fs, at, body)
            hit("object.put_new.after")

        try:
            self._do("create", path, create)
        except AlreadyExists:
            # The file system may have repeated a request whose answer was lost.
            if self._protocol == "memory" or self.read(path) != body:
                raise

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is fine."""
        try:
            self._do("delete", path, lambda fs, at: fs.rm_file(at))
        except ObjectNotFound:
            return

    def delete_tree(self, path: str) -> None:
        """Delete everything below a prefix."""
        try:
            self._do("delete", path, lambda fs, at: fs.rm(at, recursive=True))
        except ObjectNotFound:
            return

    def rename_dir(self, source: str, target: str) -> None:
        """Not possible here; see :attr:`has_rename`."""
        msg = f"{self._show(source)}: object stores cannot rename a directory in one step"
        raise StorageError(msg)

    def _connect(self) -> tuple[Any, str]:
        try:
            fs, root = fsspec.url_to_fs(
                self._source, skip_instance_cache=True, use_listings_cache=False, **self._options
            )
        except (ValueError, ImportError, TypeError) as error:
            reason = self._redact(str(error))
            msg = f"{self._url}: cannot open a {self._protocol!r} store: {reason}"
            raise ConfigError(msg) from None
        except Exception as error:  # noqa: BLE001 - raised again as one of ours
            self._raise("connect", "", error)
        return fs, str(root).rstrip("/")

    def _show(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    def _do(self, action: str, path: str, work: Callable[[Any, str], T]) -> T:
        """Run one call of the file system; whatever it raises becomes one of our errors."""
        checked_path(path, root_allowed=action == "list")
        if os.getpid() != self._pid:  # its threads and sockets stayed with the parent
            self._fs, self._root = self._connect()
            self._pid = os.getpid()
        self._meter.add(requests=1)
        try:
            return work(self._fs, self._at(path))
        except (StorageError, ConfigError):
            raise
        except Exception as error:  # noqa: BLE001 - raised again as one of ours
            self._raise(action, path, error)

    def _raise(self, action: str, path: str, error: Exception) -> NoReturn:
        text = str(error)
        reason = self._redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)
        message = f"{self._show(path)}: {action} failed: {reason}"
        cause = error if self._redact(text) == text else None
        if isinstance(error, FileExistsError):
            msg = f"{self._show(path)} exists already"
            raise AlreadyExists(msg) from cause
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise ObjectNotFound(message) from cause
        raise StorageError(message) from cause

    def _create(self, fs: Any, at: str, body: bytes) -> None:
        if self._protocol == "memory":
            with _memory_lock:
                fs.pipe_file(at, body, mode="create")
        else:
            fs.pipe_file(at, body, mode="create")

    def _probe(self) -> None:
        """Make sure once that a second exclusive create is refused."""
        if self._protocol not in _EXCLUSIVE:
            self._not_exclusive("has no exclusive create")
        name = f".probe-{uuid.uuid4().hex}"
        try:
            # Nobody else has this name: a refusal is the file system's own second request, sent
            # because the answer to the first was lost.
            with suppress(AlreadyExists):
                self._do("create", name, lambda fs, at: self._create(fs, at, b"1"))
            self._do("create", name, lambda fs, at: self._create(fs, at, b"2"))
        except AlreadyExists:
            return
        finally:
            self.delete(name)
        self._not_exclusive("overwrites on an exclusive create")

    def _not_exclusive(self, how: str) -> NoReturn:
        msg = (
            f"{self._url}: a {self._protocol!r} store {how}, so two trainers on this root could "
            "overwrite each other; use S3, Google Cloud Storage, Azure or a POSIX directory"
        )
        raise StoreNotExclusive(msg)
