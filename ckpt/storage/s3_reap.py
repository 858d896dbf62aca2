"""Multipart uploads that nobody will finish: found, and aborted once they are old enough.

Their parts take (paid) space but show in no listing. A store aborts its own uploads on every
error; what is left over comes from processes that were killed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any

from ckpt.errors import ConfigError

from .base import Storage
from .retry import response_of
from .s3_session import S3Session

OLDER_THAN = timedelta(days=1)
"""An upload that began less than this ago may still be under way."""


@dataclass(frozen=True, slots=True)
class PendingUpload:
    """A multipart upload that was begun and neither completed nor aborted.

    Attributes:
        path: the file it would become, relative to the store's root.
        upload_id: the server's name for it.
        age: time since it began, by the server's clock.
    """

    path: str
    upload_id: str
    age: timedelta


def reap_uploads(
    storage: Storage, older_than: timedelta = OLDER_THAN, *, dry_run: bool = False
) -> tuple[list[PendingUpload], list[PendingUpload]]:
    """Abort the unfinished uploads below a root that began too long ago to be under way.

    Args:
        storage: an S3 root.
        older_than: least age of an upload that goes.
        dry_run: abort nothing.

    Returns:
        The uploads that were (or would be) aborted, and those that stay.

    Raises:
        ConfigError: the store is not S3, or a negative age.
        StorageError: the store failed.
    """
    from .s3 import S3Storage

    if not isinstance(storage, S3Storage):
        msg = f"{storage.url}: only S3 stores have unfinished uploads"
        raise ConfigError(msg)
    if older_than < timedelta(0):
        msg = f"older_than must not be negative, got {older_than}"
        raise ConfigError(msg)
    gone: list[PendingUpload] = []
    stay: list[PendingUpload] = []
    for upload in storage.pending_uploads():
        if upload.age < older_than:
            stay.append(upload)
            continue
        if not dry_run:
            storage.abort_upload(upload)
        gone.append(upload)
    return gone, stay


async def pending(
    session: S3Session, prefix: str, relative: Callable[[str], str]
) -> list[PendingUpload]:
    """Every unfinished upload below a prefix, in the order of keys."""
    query: dict[str, Any] = {"Prefix": prefix}
    found: list[PendingUpload] = []
    while True:
        page = await session.send("list_multipart_uploads", query)
        now = _server_time(page)
        found += [
            # The server's date has whole seconds: what has just begun would begin later.
            PendingUpload(
                relative(item["Key"]), item["UploadId"], max(timedelta(0), now - item["Initiated"])
            )
            for item in page.get("Uploads", ())
            if item["Key"].startswith(prefix)  # one server's filter is another's suggestion
        ]
        if not page.get("IsTruncated"):
            return sorted(found, key=lambda upload: upload.path)
        query["KeyMarker"] = page["NextKeyMarker"]
        query["UploadIdMarker"] = page["NextUploadIdMarker"]


async def abort(session: S3Session, key: str, upload_id: str) -> None:
    """Abort an upload; one that is finished or gone already is fine."""
    try:
        await session.send("abort_multipart_upload", {"Key": key, "UploadId": upload_id})
    except Exception as error:
        response = response_of(error) or {}
        if response.get("ResponseMetadata", {}).get("HTTPStatusCode") != 404:
            raise


def _server_time(answer: dict[str, Any]) -> datetime:
    """What the server's clock said with an answer; ages by our own clock could be anything."""
    said = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
    if not said:
        return datetime.now(UTC)
    return parsedate_to_datetime(said).astimezone(UTC)
