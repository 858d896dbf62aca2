"""Stand-ins for gcsfs and adlfs: file systems of fsspec with those packages' habits, in memory.

What they share with the real ones, read in their sources: names without a protocol; listings
that are remembered unless told otherwise, so that another client's writes do not show;
``pipe_file(mode="create")`` as one conditional request whose refusal is a FileExistsError; and
FileNotFoundError for what is not there, also for the listing of an empty prefix.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

from fsspec import AbstractFileSystem
from fsspec.registry import _registry


class GoogleBuckets(AbstractFileSystem):
    """As gcsfs. Options of our own make it misbehave.

    Args:
        repeats: the answer to every conditional create is lost once and the request sent again.
        ignores_mode: ``mode="create"`` overwrites, as in versions that do not know it.
    """

    protocol = ("gs", "gcs")
    slash: ClassVar[str] = ""
    """Behind the names of directories."""
    broken: ClassVar[str] = ""
    """Text of the error that every upload ends with."""
    objects: ClassVar[dict[str, bytes]] = {}
    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        *,
        repeats: bool = False,
        ignores_mode: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.repeats, self.ignores_mode = repeats, ignores_mode

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        del options
        path = self._strip_protocol(path).rstrip("/")
        if path in self.dircache:
            found = self.dircache[path]
        else:
            # With use_listings_cache=False the cache keeps nothing.
            found = self.dircache[path] = list(self._children(path))
        if not found:
            raise FileNotFoundError(path)
        return found if detail else [entry["name"] for entry in found]

    def _children(self, path: str) -> Iterator[dict[str, Any]]:
        with self.lock:
            objects = dict(self.objects)
        if path in objects:
            yield self._file(path, objects[path])
        seen = set()
        for name, data in sorted(objects.items()):
            if not name.startswith(f"{path}/"):
                continue
            child, more, _ = name[len(path) + 1 :].partition("/")
            if not more:
                yield self._file(name, data)
            elif child not in seen:
                seen.add(child)
                yield {"name": f"{path}/{child}{self.slash}", "size": 0, "type": "directory"}

    def _file(self, name: str, data: bytes) -> dict[str, Any]:
        return {"name": name, "size": len(data), "type": "file"}

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        del options
        path = self._strip_protocol(path).rstrip("/")
        with self.lock:
            if path in self.objects:
                return self._file(path, self.objects[path])
            if any(name.startswith(f"{path}/") for name in self.objects):
                return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        del options
        with self.lock:
            if path not in self.objects:
                raise FileNotFoundError(path)
            return self.objects[path][start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        del options
        if self.broken:
            raise OSError(self.broken)
        exclusive = mode == "create" and not self.ignores_mode
        with self.lock:
            for _ in range(1 + (exclusive and self.repeats)):
                if exclusive and path in self.objects:
                    raise FileExistsError(path)
                self.objects[path] = bytes(value)
        self.invalidate_cache(self._parent(path))

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes(), **options)

    def rm_file(self, path: str) -> None:
        with self.lock:
            if self.objects.pop(path, None) is None:
                raise FileNotFoundError(path)
        self.invalidate_cache(self._parent(path))

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        del recursive, maxdepth
        with self.lock:
            names = [n for n in self.objects if n == path or n.startswith(f"{path}/")]
            for name in names:
                del self.objects[name]
        if not names:
            raise FileNotFoundError(path)
        self.invalidate_cache(path)

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.clear()
        super().invalidate_cache(path)


class AzureContainers(GoogleBuckets):
    """As adlfs, which ends directories with a slash."""

    protocol = ("az", "abfs", "abfss")
    slash = "/"
    objects: ClassVar[dict[str, bytes]] = {}


@contextmanager
def registered() -> Iterator[None]:
    """Known to fsspec in place of the packages, and empty."""
    classes = {name: cls for cls in (GoogleBuckets, AzureContainers) for name in cls.protocol}
    with mock.patch.dict(_registry, classes):
        try:
            yield
        finally:
            for cls in (GoogleBuckets, AzureContainers):
                cls.objects.clear()
                cls.clear_instance_cache()
