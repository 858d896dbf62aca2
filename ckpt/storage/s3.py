"""Storage below ``s3://bucket/prefix``, through s3fs.

Whole-object PUTs, own multipart uploads that are aborted on any error, conditional creates that
are settled by reading back. Nothing is ever written through an open file, which would publish a
part of it on error.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

from fsspec.asyn import FSTimeoutError

from ckpt.errors import (
    AlreadyExists,
    CommitUnknown,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StoreNotExclusive,
)

from .base import Buffer, Entry
from .faultpoints import hit
from .paths import SourceFailed, as_views, checked_path, collect, sized_views
from .redact import Redactor, public_url
from .retry import Fate, RetryPolicy, fate_of, response_of
from .s3_create import create, create_large, probe, probe_large
from .s3_facts import S3Facts, ask
from .s3_reap import PendingUpload, abort, pending
from .s3_session import PART_BYTES, S3Session, ShortObject
from .s3_upload import SINGLE_PUT_BYTES, LyingServer, multipart, put_object
from .traffic import Traffic

T = TypeVar("T")

_CHECKSUMS = ("crc32", "none")
_DELETE_BATCH = 1000
"""Keys in one request to delete: the API's limit."""


class S3Storage:
    """Storage below ``s3://bucket/prefix``.

    Args:
        url: bucket and prefix.
        options: keyword arguments of ``s3fs.S3FileSystem`` (``endpoint_url``, ``profile``, ``key``,
            ``client_kwargs``, ...). What is missing comes from the AWS environment. Two more are
            ours: ``upload_checksum``, ``"crc32"`` (default: sent with every upload and verified
            by the server) or ``"none"``; and ``retry``, a mapping of the attributes of
            :class:`~ckpt.storage.retry.RetryPolicy`.
        policy: bounds on repetition, instead of the option.

    Raises:
        ConfigError: a URL with credentials, a query, or without a bucket; a bad option.
    """

    _session_class: ClassVar[type[S3Session]] = S3Session

    def __init__(
        self, url: str, options: Mapping[str, Any], policy: RetryPolicy | None = None
    ) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc:
            msg = "an S3 URL must not hold credentials; use the AWS_* environment, a profile or "
            raise ConfigError(msg + "storage_options")
        if parts.query or parts.fragment or not parts.netloc:
            msg = f"an S3 URL must be s3://bucket/prefix, got {public_url(url)!r}"
            raise ConfigError(msg)
        self._bucket = parts.netloc
        self._prefix = "/".join(part for part in parts.path.split("/") if part)
        if self._prefix:
            checked_path(self._prefix)
        self._url = f"s3://{self._bucket}" + (f"/{self._prefix}" if self._prefix else "")
        self._options = dict(options)
        retry = self._options.pop("retry", None)
        if policy is None:
            policy = RetryPolicy() if retry is None else RetryPolicy.from_option(retry)
        self._policy = policy
        self._redact = Redactor(self._options)
        checksum = self._options.pop("upload_checksum", "crc32")
        if checksum not in _CHECKSUMS:
            msg = f"upload_checksum must be one of {_CHECKSUMS}, got {checksum!r}"
            raise ConfigError(msg)
        self._checksum = checksum
        self._session = self._session_class(
            self._bucket, self._options, self._policy, checksum=checksum == "crc32"
        )
        self._proven: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Connections do not travel to another process; the settings do."""
        options = {**self._options, "upload_checksum": self._checksum}
        return type(self), (self._url, options, self._policy)

    @property
    def url(self) -> str:
        """``s3://bucket/prefix``."""
        return self._url

    @property
    def has_rename(self) -> bool:
        """Never: a rename would be a copy and a delete."""
        return False

    @property
    def traffic(self) -> Traffic:
        """Requests and bytes so far."""
        return self._session.meter.read()

    def local_path(self, path: str) -> Path | None:
        """None."""
        return None

    def close(self) -> None:
        """Close the connections; the next request opens new ones."""
        self._session.close()

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes ``[start, end)``, in parallel ranges when they are many."""
        key = self._key(path)
        if end is None and start == 0:
            return bytes(self._do("read", path, lambda: self._session.get(key)))
        if end is None:
            end = self.size(path)
        if not 0 <= start <= end:
            msg = f"{self._show(path)}: {start} to {end} is not a range of bytes"
            raise StorageError(msg)
        if end - start <= PART_BYTES:
            return bytes(self._do("read", path, lambda: self._session.get_range(key, start, end)))
        if end > self.size(path):  # before memory is taken for it
            msg = f"{self._show(path)}: too short: wanted bytes up to {end}"
            raise StorageError(msg)
        data = bytearray(end - start)
        self.read_into(path, start, memoryview(data))
        return bytes(data)

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target``, in parallel ranges when it is long."""
        key, view = self._key(path), target.cast("B")
        self._do("read", path, lambda: self._session.get_into(key, start, view))

    def size(self, path: str) -> int:
        """Size of an object in bytes."""
        key = self._key(path)
        answer = self._do("stat", path, lambda: self._session.send("head_object", {"Key": key}))
        return int(answer["ContentLength"])

    def exists(self, path: str) -> bool:
        """Whether an object lies at the path."""
        try:
            self.size(path)
        except ObjectNotFound:
            return False
        return True

    def list(self, path: str) -> list[Entry]:
        """Immediate children below a prefix, sorted by name."""
        key = self._key(path, root_allowed=True)
        prefix = f"{key}/" if key else ""

        async def collect() -> list[Entry]:
            entries: list[Entry] = []
            async for page in self._session.pages(prefix, "/"):
                entries += [
                    Entry(item["Prefix"][len(prefix) : -1], True, 0)
                    for item in page.get("CommonPrefixes", ())
                ]
                entries += [
                    Entry(item["Key"][len(prefix) :], False, item["Size"])
                    for item in page.get("Contents", ())
                    if item["Key"] != prefix
                ]
            return sorted(entries, key=lambda entry: entry.name)

        return self._do("list", path, collect)

    def put(self, path: str, data: Buffer | Sequence[Buffer]) -> None:
        """Write a whole object: one PUT, or a multipart upload that is completed at the end."""
        key = self._key(path)
        views = as_views(data)
        size = sum(len(view) for view in views)

        async def send() -> None:
            hit("object.put.before")
            if size <= SINGLE_PUT_BYTES:
                body = data if isinstance(data, bytes) else b"".join(views)
                await self._put_whole(key, body)
            else:
                await self._put_parts(key, views, size)
            hit("object.put.after")

        self._do("write", path, send)

    def put_stream(self, path: str, chunks: Iterable[Buffer], size: int) -> None:
        """Write a whole object from buffers as they are made; holds a few parts at a time."""
        key = self._key(path)
        views = sized_views(chunks, size, self._show(path))

        async def send() -> None:
            if size <= SINGLE_PUT_BYTES:
                await self._put_whole(key, await asyncio.to_thread(collect, views))
            else:
                await self._put_parts(key, views, size)

        try:
            self._do("write", path, send)
        except SourceFailed as failed:
            raise failed.cause from None

    def put_new(self, path: str, data: Buffer) -> None:
        """Exclusive create by ``If-None-Match: *``; a lost answer is settled by reading back.

        The data should hold something that nobody else would write (an attempt id, a nonce): if
        the object already holds exactly these bytes, this caller counts as the one that wrote it.

        Raises:
            AlreadyExists: the object holds other bytes.
            CommitUnknown: an answer was lost and reading back did not tell.
            StoreNotExclusive: the store does not keep the condition.
        """
        key = self._key(path)
        body = bytes(data)
        large = len(body) > SINGLE_PUT_BYTES
        self._check_exclusive(large=large)
        send = create_large if large else create
        outcome = self._do("create", path, lambda: send(self._session, key, body))
        if outcome is not None:
            self._settle(path, body, outcome.error)

    def delete(self, path: str) -> None:
        """Delete an object; a missing one is fine."""
        key = self._key(path)
        self._do("delete", path, lambda: self._session.send("delete_object", {"Key": key}))

    def delete_tree(self, path: str) -> None:
        """Delete every object below a prefix."""
        prefix = f"{self._key(path)}/"

        async def remove() -> None:
            keys = [
                item["Key"]
                async for page in self._session.pages(prefix, None)
                for item in page.get("Contents", ())
            ]
            for index in range(0, len(keys), _DELETE_BATCH):
                batch = [{"Key": key} for key in keys[index : index + _DELETE_BATCH]]
                query = {"Delete": {"Objects": batch, "Quiet": True}}
                answer = await self._session.send("delete_objects", query)
                for failure in answer.get("Errors", ()):
                    msg = f"{failure.get('Key')}: {failure.get('Code')} {failure.get('Message')}"
                    raise StorageError(msg)

        self._do("delete", path, remove)

    def rename_dir(self, source: str, target: str) -> None:
        """Not possible here; see :attr:`has_rename`."""
        msg = f"{self._show(source)}: object stores cannot rename a directory in one step"
        raise StorageError(msg)

    def pending_uploads(self) -> Sequence[PendingUpload]:
        """Multipart uploads below the root that are neither completed nor aborted."""
        prefix = f"{self._prefix}/" if self._prefix else ""
        return self._do(
            "list", "", lambda: pending(self._session, prefix, lambda key: key[len(prefix) :])
        )

    def abort_upload(self, upload: PendingUpload) -> None:
        """Abort one of them; fine if it ended meanwhile."""
        key = "/".join(part for part in (self._prefix, upload.path) if part)
        self._do("abort", upload.path, lambda: abort(self._session, key, upload.upload_id))

    def ask(self, path: str) -> S3Facts:
        """What the server keeps of its promises, tried out on an object that nobody else uses."""
        key = self._key(path)
        return self._do("probe", path, lambda: ask(self._session, key))

    def presigned_url(self, path: str, expires_s: int) -> str:
        """A URL that reads an object, for ``expires_s`` seconds; signed here, without a request."""
        key = self._key(path)
        url: str = self._do("sign", path, lambda: self._session.presign(key, expires_s))
        return url

    async def _put_whole(self, key: str, body: bytes) -> None:
        await put_object(self._session, key, body)

    async def _put_parts(self, key: str, views: Iterable[memoryview], size: int) -> None:
        await multipart(self._session, key, views, size)

    def _key(self, path: str, *, root_allowed: bool = False) -> str:
        checked_path(path, root_allowed=root_allowed)
        return "/".join(part for part in (self._prefix, path) if part)

    def _show(self, path: str) -> str:
        return f"{self._url}/{path}" if path else self._url

    def _do(self, action: str, path: str, work: Callable[[], Awaitable[T]]) -> T:
        """Run a coroutine on s3fs's loop; whatever it raises becomes one of our errors."""
        try:
            return self._session.run(work)
        except (ShortObject, LyingServer) as error:
            msg = f"{self._show(path)}: {error}"
            raise StorageError(msg) from None
        except (SourceFailed, ConfigError, StorageError):
            raise
        except Exception as error:  # noqa: BLE001 - raised again as one of ours
            raise self._translated(action, path, error) from self._cause(error)

    def _translated(self, action: str, path: str, error: Exception) -> StorageError:
        response = response_of(error)
        if isinstance(error, FSTimeoutError):
            reason = "no answer in time"
        elif response is None:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        else:
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", "?")
            detail = response["Error"]
            reason = f"HTTP {status} {detail.get('Code', '')}: {detail.get('Message', '')}"
        kind = ObjectNotFound if fate_of(error) is Fate.MISSING else StorageError
        return kind(f"{self._show(path)}: {action} failed: {self._redact(reason)}")

    def _cause(self, error: Exception) -> Exception | None:
        """The original error, unless its own text would show a secret in a traceback."""
        link: BaseException | None = error
        while link is not None:
            if self._redact(str(link)) != str(link):
                return None
            link = link.__cause__ or link.__context__
        return error

    def _settle(self, path: str, body: bytes, error: Exception) -> None:
        """Decide a conditional create by what lies there now."""
        refused = fate_of(error) is Fate.TAKEN
        reason = self._redact(str(error) or type(error).__name__)
        try:
            found = self.read(path)
        except ObjectNotFound:
            if refused:
                msg = f"{self._show(path)} existed and was deleted meanwhile"
                raise AlreadyExists(msg) from None
            msg = (
                f"{self._show(path)}: the answer to the create was lost ({reason}) and the object "
                "is not there; it may still appear"
            )
            raise CommitUnknown(msg) from None
        except StorageError as unread:
            msg = (
                f"{self._show(path)}: the answer to the create was lost or negative ({reason}) "
                f"and it cannot be read back: {unread}"
            )
            raise CommitUnknown(msg) from None
        if found != body:
            msg = f"{self._show(path)} exists already, written by somebody else"
            raise AlreadyExists(msg)

    def _check_exclusive(self, *, large: bool) -> None:
        """Make sure that the store refuses a second conditional create: once for each kind.

        A large create needs the small kind too: it is the one whose answers show that the store
        takes the condition seriously at all.
        """
        self._prove("PUT", probe, "the store")
        if large:
            self._prove(
                "multipart",
                probe_large,
                f"an exclusive create of more than {SINGLE_PUT_BYTES} bytes is a multipart upload, "
                "and the store",
            )

    def _prove(
        self, kind: str, test: Callable[[S3Session, str], Awaitable[str | None]], what: str
    ) -> None:
        if kind in self._proven:
            return
        name = f".probe-{uuid.uuid4().hex}"
        key = self._key(name)
        problem = self._do("probe", name, lambda: test(self._session, key))
        if problem:
            msg = (
                f"{self._url}: {what} {problem}, so two trainers on this root could overwrite "
                "each other; use a store with conditional writes (AWS S3, Ceph, ...) or a POSIX "
                "directory"
            )
            raise StoreNotExclusive(msg)
        self._proven.add(kind)
