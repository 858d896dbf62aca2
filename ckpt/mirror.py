"""Copies committed steps and versions of a tier to the root, with the root's commit protocol.

Files go up first, their CRC32s checked while they are read; a file that does not verify is never
visible at the root. The manifest goes last, exclusively, and only once every file of every part
lies there with its size. Whether a writer may still commit follows from the root's own writer
records: the step has to be in the lineage.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Final

from .catalog import check_sizes
from .commit import Place, newest_epoch, place, reveal_step
from .errors import (
    AlreadyExists,
    DamagedError,
    ObjectNotFound,
    StepExists,
    StorageError,
    Superseded,
)
from .layout import (
    MANIFEST,
    WRITERS,
    parse_writer,
    tmp_version_dir,
    version_dir,
    writer_path,
)
from .lineage import chain_end, committed_lineage
from .manifest import StepManifest, VersionManifest, WriterRecord
from .storage import Storage, verified_blocks
from .storage.faultpoints import hit
from .tier import Item, Outcome, Tier
from .types import FileRecord

logger = logging.getLogger(__name__)

WAITING: Final = None
"""Not settled: this tier's part is up, those of other nodes are not."""


class Mirror:
    """Brings one tier's items to one root.

    Args:
        tier: where they are.
        remote: where they go.
        on_bytes: told the size of every block that was read, before it is sent.
    """

    def __init__(self, tier: Tier, remote: Storage, on_bytes: Callable[[int], object]) -> None:
        self._tier = tier
        self._remote = remote
        self._on_bytes = on_bytes
        self._writers: dict[int, WriterRecord] = {}
        self._ours: set[int] = set()
        self.metrics: dict[tuple[int, int], Mapping[str, float]] = {}
        """The trainer's values of the steps that were mirrored, for the retention at the root."""
        self.superseded: int | None = None
        """The newer writer on whose account a step was last left behind."""

    def run(self, item: Item) -> Outcome | None:
        """Mirror one item as far as possible, and mark it if that settles it.

        Returns:
            What became of it, or None while other nodes' parts are missing.

        Raises:
            DamagedError: its bytes in the tier do not verify (it is marked first) or cannot be
                read, or a record of the root does not verify; other items may be fine.
            StorageError: the root or the tier failed; a later call goes on where this one ended.
            CommitUnknown: the fate of the manifest is open; a later call settles it.
        """
        try:
            outcome = self._version(item) if item.pair is None else self._step(item, *item.pair)
        except _BrokenItem as broken:
            self._tier.settle(item, Outcome.damaged)
            raise DamagedError(f"{item.name} stays in the tier: {broken}") from broken.__cause__
        if outcome is not None:
            hit("upload.before_mark")
            self._tier.settle(item, outcome)
        return outcome

    def _step(self, item: Item, step: int, epoch: int) -> Outcome | None:
        self._check_writer(epoch)
        if not self._in_lineage(step, epoch):
            return Outcome.abandoned
        manifest = self._read_step(item, step, epoch)
        self.metrics[step, epoch] = manifest.metrics
        part = self._tier.part(item.path)
        if self._is_there(item, manifest):
            return Outcome.mirrored
        remote = self._remote
        where = place(remote, step, epoch, manifest.attempt)
        for record in manifest.files:
            if part is None or record.name in part.files:
                self._send(f"{item.path}/{record.name}", record, where.path(record.name))
        if part is not None and not part.coordinator:
            return WAITING
        named = _renamed(manifest, where)
        problems = check_sizes(remote, where.base, named.files)
        if problems:
            logger.info("%s waits for parts of other nodes: %s", item.name, problems[0].message)
            return WAITING
        hit("upload.before_commit")
        if not self._in_lineage(step, epoch):
            return Outcome.abandoned
        try:
            reveal_step(remote, where, named)
        except StepExists:
            if not self._is_there(item, manifest):
                raise
        return Outcome.mirrored

    def _version(self, item: Item) -> Outcome:
        tier, remote = self._tier.storage, self._remote
        path = f"{item.path}/{MANIFEST}"
        with _reading_item():
            data = tier.read(path)
            manifest = VersionManifest.from_bytes(data, f"{tier.url}/{path}")
            if manifest.name != item.name:
                raise DamagedError(f"{tier.url}/{path} is that of {manifest.name}")
        self._check_writer(manifest.epoch)
        if self._same(path, data):
            return Outcome.mirrored
        run, _, number = item.name.rpartition("-v")
        final = version_dir(run, int(number))
        scratch = tmp_version_dir(item.name, manifest.attempt) if remote.has_rename else final
        for record in manifest.files:
            self._send(f"{item.path}/{record.name}", record, f"{scratch}/{record.name}")
        hit("upload.before_commit")
        # Files of an old claim may be taken for those of a dead writer, and removed.
        problems = check_sizes(remote, scratch, manifest.files)
        if problems:
            raise StorageError(f"{problems[0].message}; the version goes up again")
        try:
            if remote.has_rename:
                remote.put(f"{scratch}/{MANIFEST}", data)
                remote.rename_dir(scratch, final)
            else:
                remote.put_new(f"{final}/{MANIFEST}", data)
        except AlreadyExists:
            if not self._same(path, data):
                raise
        return Outcome.mirrored

    def _send(self, source: str, record: FileRecord, target: str) -> None:
        """Put one file up, unless an earlier run did: a visible file is a verified one."""
        try:
            if self._remote.size(target) == record.size:
                return
        except ObjectNotFound:
            pass
        hit("upload.before_file")
        self._remote.put_stream(target, self._blocks(source, record), record.size)
        hit("upload.after_file")

    def _blocks(self, source: str, record: FileRecord) -> Iterator[bytes]:
        blocks = verified_blocks(self._tier.storage, source, record)
        while True:
            with _reading_item():
                block = next(blocks, None)
            if block is None:
                return
            self._on_bytes(len(block))
            hit("upload.mid_file")
            yield block

    def _read_step(self, item: Item, step: int, epoch: int) -> StepManifest:
        tier = self._tier.storage
        path = f"{item.path}/{MANIFEST}"
        where = f"{tier.url}/{path}"
        with _reading_item():
            manifest = StepManifest.from_bytes(tier.read(path), where)
            if (manifest.step, manifest.epoch) != (step, epoch):
                msg = f"{where} is that of step {manifest.step}, writer {manifest.epoch}"
                raise DamagedError(msg)
        return manifest

    def _is_there(self, item: Item, manifest: StepManifest) -> bool:
        """Whether the root has this very attempt.

        Raises:
            DamagedError: it has another attempt at the step by the same writer.
        """
        path = f"{item.path}/{MANIFEST}"
        try:
            data = self._remote.read(path)
        except ObjectNotFound:
            return False
        found = StepManifest.from_bytes(data, f"{self._remote.url}/{path}")
        if found.attempt != manifest.attempt:
            msg = f"{self._remote.url}/{path} is that of another attempt ({found.attempt})"
            raise DamagedError(msg)
        return True

    def _same(self, path: str, data: bytes) -> bool:
        """Whether the root has a version's manifest.

        Raises:
            DamagedError: it has another one under that name.
        """
        try:
            found = self._remote.read(path)
        except ObjectNotFound:
            return False
        if found != data:
            raise DamagedError(f"{self._remote.url}/{path} is that of another attempt")
        return True

    def _check_writer(self, epoch: int) -> None:
        """Refuse the steps of another run.

        Raises:
            Superseded: the tier's record of the epoch is not the root's.
        """
        if epoch in self._ours:
            return
        if not self._tier.same_writer(self._remote, epoch):
            raise Superseded(self._tier.foreign(epoch))
        self._ours.add(epoch)

    def _in_lineage(self, step: int, epoch: int) -> bool:
        """Whether a restore might choose the step, by the root's records of this moment.

        Raises:
            DamagedError: a damaged or lost record leaves that open, so nothing is settled.
        """
        listed = {parse_writer(entry.name) for entry in self._remote.list(WRITERS)}
        broken: dict[int, str] = {}
        for number in sorted(number for number in listed if number is not None):
            if number not in self._writers:
                path = writer_path(number)
                where = f"{self._remote.url}/{path}"
                try:
                    self._writers[number] = WriterRecord.from_bytes(self._remote.read(path), where)
                except DamagedError as error:
                    broken[number] = str(error)
        unknown = [WriterRecord(number, None, None, "", 0, "", "") for number in broken]
        if committed_lineage([*self._writers.values(), *unknown], [(step, epoch)]):
            return True
        end = chain_end(self._writers, max((*self._writers, *broken), default=0))
        if end not in self._writers and epoch < end:
            why = broken.get(end, f"{self._remote.url}/{writer_path(end)} is missing")
            msg = f"{why}; whether step {step} of writer {epoch} still counts is not known"
            raise DamagedError(msg)
        self.superseded = newest_epoch(self._remote)
        return False


class _BrokenItem(Exception):
    """The item's own bytes do not verify, as opposed to something at the root."""


@contextlib.contextmanager
def _reading_item() -> Iterator[None]:
    """Tell what is wrong with the item from what is wrong with the root.

    Raises:
        _BrokenItem: the item does not verify, or lacks a file.
        DamagedError: it cannot be read just now; a later try may.
    """
    try:
        yield
    except (DamagedError, ObjectNotFound) as error:
        raise _BrokenItem(str(error)) from error
    except StorageError as error:
        raise DamagedError(f"cannot be read in the tier: {error}") from error


def _renamed(manifest: StepManifest, where: Place) -> StepManifest:
    """The manifest as it is at the root, where files may lie below the attempt's own name."""
    return replace(
        manifest,
        files=tuple(replace(file, name=where.name(file.name)) for file in manifest.files),
        tensors=tuple(
            replace(
                tensor,
                chunks=tuple(
                    replace(chunk, file=where.name(chunk.file)) for chunk in tensor.chunks
                ),
            )
            for tensor in manifest.tensors
        ),
    )
