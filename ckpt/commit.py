"""The only place that makes a step or a writer epoch exist.

Where directories can be renamed, a step is written aside and appears by one rename. On an object
store its files lie below the attempt's own prefix and the manifest, created exclusively and
last, makes them a step.
"""

from __future__ import annotations

import logging
import os
import socket
import uuid
from dataclasses import dataclass

from .envelope import utc_now
from .errors import (
    AlreadyExists,
    CommitUnknown,
    ObjectNotFound,
    StepExists,
    StorageError,
    Superseded,
    UnrestoredRoot,
)
from .layout import (
    MANIFEST,
    STEPS,
    WRITERS,
    parse_step_dir,
    parse_writer,
    step_dir,
    tmp_step_dir,
    writer_path,
)
from .manifest import CheckedTensors, StepManifest, WriterRecord
from .storage import Storage
from .storage.faultpoints import hit

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parent:
    """The step that a writer goes on from."""

    epoch: int
    step: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where the files of one attempt at a step are written.

    Attributes:
        base: directory that the names in the manifest are relative to.
        prefix: what those names begin with (``""``, or the attempt's own folder).
        scratch: what an aborted attempt leaves behind, to be deleted.
        final: the step's directory.
    """

    base: str
    prefix: str
    scratch: str
    final: str

    def name(self, file: str) -> str:
        """A file's name in the manifest."""
        return self.prefix + file

    def path(self, file: str) -> str:
        """Where that file is written, relative to the root."""
        return f"{self.base}/{self.prefix}{file}"


def place(storage: Storage, step: int, epoch: int, attempt: str) -> Place:
    """Where an attempt at a step writes."""
    final = step_dir(step, epoch)
    if storage.has_rename:
        scratch = tmp_step_dir(step, attempt)
        return Place(base=scratch, prefix="", scratch=scratch, final=final)
    return Place(base=final, prefix=f"{attempt}/", scratch=f"{final}/{attempt}", final=final)


def newest_epoch(storage: Storage) -> int:
    """The highest writer epoch that was ever claimed, 0 if none was."""
    epochs = (parse_writer(entry.name) for entry in storage.list(WRITERS))
    return max((epoch for epoch in epochs if epoch is not None), default=0)


def claim_epoch(
    storage: Storage, parent: Parent | None, *, seen: int | None, fresh: bool
) -> WriterRecord:
    """Become the root's writer.

    Args:
        storage: the root.
        parent: the step that was restored, or None.
        seen: the newest epoch when this manager restored, or None if it did not.
        fresh: start over, whatever the root holds.

    Raises:
        UnrestoredRoot: the root holds steps and the caller neither restored nor said ``fresh``.
        Superseded: another writer began after this one restored.
    """
    steps = [parse_step_dir(entry.name) for entry in storage.list(STEPS)]
    known = [pair for pair in steps if pair is not None]
    if known and seen is None and not fresh:
        newest = max(known)[0]
        msg = (
            f"{storage.url} holds steps (up to {newest}) but this manager has not restored from "
            "it; call restore() first, or pass fresh=True to start a new run over it"
        )
        raise UnrestoredRoot(msg)
    while True:
        newest = newest_epoch(storage)
        if seen is not None and not fresh and newest > seen:
            msg = (
                f"writer {newest} began on {storage.url} after this one restored (it saw writer "
                f"{seen}); another trainer uses this root"
            )
            raise Superseded(msg)
        # Steps of a writer whose record was lost must not be taken for ours.
        epoch = 1 + max([newest, *(pair[1] for pair in known)])
        record = WriterRecord(
            epoch=epoch,
            parent_epoch=None if parent is None else parent.epoch,
            parent_step=None if parent is None else parent.step,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=utc_now(),
            nonce=uuid.uuid4().hex,
        )
        try:
            storage.put_new(writer_path(epoch), record.to_bytes())
        except AlreadyExists:
            logger.info("writer %d of %s was claimed by somebody else", epoch, storage.url)
            continue
        return record


def check_current(storage: Storage, epoch: int) -> None:
    """Refuse to go on once a newer writer has begun.

    Raises:
        Superseded: it has; nothing of this writer will be restored from any more.
    """
    newest = newest_epoch(storage)
    if newest > epoch:
        msg = (
            f"writer {newest} has taken over {storage.url}; this is writer {epoch}, whose saves "
            "no longer count. Stop this trainer, or restore() to take over again"
        )
        raise Superseded(msg)


def commit_step(
    storage: Storage,
    where: Place,
    manifest: StepManifest,
    checked: CheckedTensors | None = None,
) -> None:
    """Make a step exist; all its files are written and checked.

    Args:
        storage: the root.
        where: where the files of the attempt are.
        manifest: what the step holds.
        checked: see :meth:`StepManifest.to_bytes`.

    Raises:
        Superseded: a newer writer has begun.
        StepExists: this writer has committed the step already.
        CommitUnknown: the manifest's fate could not be read back.
    """
    check_current(storage, manifest.epoch)
    reveal_step(storage, where, manifest, checked)


def reveal_step(
    storage: Storage,
    where: Place,
    manifest: StepManifest,
    checked: CheckedTensors | None = None,
) -> None:
    """As :func:`commit_step`, for a writer whose right to the step was checked already.

    Raises:
        StepExists: it is there already.
        CommitUnknown: the manifest's fate could not be read back.
    """
    data = manifest.to_bytes(checked)
    hit("commit.before_manifest")
    try:
        if storage.has_rename:
            storage.put(f"{where.base}/{MANIFEST}", data)
            storage.rename_dir(where.scratch, where.final)
        else:
            storage.put_new(f"{where.final}/{MANIFEST}", data)
        hit("commit.after_manifest")
    except AlreadyExists as error:
        msg = f"step {manifest.step} of writer {manifest.epoch} is already committed"
        raise StepExists(msg) from error
    except OSError as error:
        if not _visible(storage, where, data):
            raise
        msg = (
            f"step {manifest.step} is visible, but the store reported an error, so it may not "
            f"be durable: {error}"
        )
        raise CommitUnknown(msg) from error


def _visible(storage: Storage, where: Place, data: bytes) -> bool:
    """Whether the manifest got through although the store reported an error.

    Raises:
        CommitUnknown: the store does not answer that either.
    """
    try:
        return storage.read(f"{where.final}/{MANIFEST}") == data
    except ObjectNotFound:
        return False
    except StorageError as error:
        msg = f"the fate of {where.final} could not be read back: {error}"
        raise CommitUnknown(msg) from error


def discard(storage: Storage, scratch: str) -> None:
    """Remove what an aborted attempt wrote; only once rank 0 has decided that it is aborted."""
    try:
        storage.delete_tree(scratch)
    except StorageError as error:
        # It has no manifest, so it is never read; a later writer sweeps it.
        logger.warning("could not remove the unfinished %s: %s", scratch, error)
