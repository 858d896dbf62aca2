"""A local tier: a directory in which steps commit before they are mirrored to the root.

It is laid out like a root, so steps and versions in it are read like any others. Beside them lie

- ``TIER.json``: its id and the root it belongs to;
- ``writers/``: copies of the root's writer records, which alone decide about epochs. A step of
  the tier counts only under an epoch whose record is the root's, byte for byte;
- ``mirror/``: the uploader's locks, heartbeat and session, and one empty file for each step or
  version that is settled. Being empty, a mark can be made on a file system that is full.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from .catalog import read_writers
from .envelope import Fields, seal, unseal
from .errors import (
    AlreadyExists,
    CkptError,
    ConfigError,
    ObjectNotFound,
    StorageError,
)
from .holds import hold
from .layout import (
    ADAPTERS,
    MANIFEST,
    MIRROR,
    PART,
    STEPS,
    TIER,
    TRASH_PREFIX,
    mark_path,
    parse_mark,
    parse_step_dir,
    parse_version_name,
    trash_path,
    writer_path,
)
from .lineage import committed_lineage
from .locks import FileLock
from .part import Part
from .storage.base import Storage
from .storage.evicting import EvictingStorage

logger = logging.getLogger(__name__)

TIER_FORMAT: Final = "ckpt.tier"
SCHEMA: Final = 1

KEPT_VERSIONS: Final = 8
"""Mirrored versions that a tier keeps when the retention sets no number."""


class Outcome(StrEnum):
    """What the uploader made of a step or version."""

    mirrored = "mirrored"
    """It is at the root, manifest and all."""
    abandoned = "abandoned"
    """A later writer resumed from before it: no restore may choose it any more."""
    damaged = "damaged"
    """Its bytes in the tier do not verify; it is kept, and not mirrored."""


@dataclass(frozen=True, slots=True)
class Item:
    """A committed step or version of a tier.

    Attributes:
        name: the last part of its path.
        path: its directory.
        pair: (step, epoch), or None for a version.
    """

    name: str
    path: str
    pair: tuple[int, int] | None


class Tier:
    """One local tier. Thread-safe; several processes may use it at the same time.

    Args:
        root: a path or ``file://`` URL.
        remote: URL of the root it belongs to, fit for a message.

    Raises:
        ConfigError: the directory is the tier of another root, or not a local one.
        StorageError: it cannot be read or written.
    """

    def __init__(self, root: str | os.PathLike[str], remote: str) -> None:
        self.storage = EvictingStorage(local_root(root), self.evict, self._explain)
        self.remote = remote
        self._lock = threading.Lock()
        self.note: str = ""
        """What the uploader says of itself, for the error of a tier that is full."""
        self.id = self._join()
        self._locks = self._place(MIRROR)
        try:
            self._locks.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self._locks}: cannot be made: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"Tier({self.storage.url!r}, {self.remote!r})"

    # ---- what it holds

    def steps(self) -> list[Item]:
        """Committed steps, by epoch and number."""
        found = []
        for entry in self.storage.list(STEPS):
            pair = parse_step_dir(entry.name) if entry.is_dir else None
            if pair is not None and self.storage.exists(f"{STEPS}/{entry.name}/{MANIFEST}"):
                found.append(Item(entry.name, f"{STEPS}/{entry.name}", pair))
        return sorted(found, key=lambda item: (item.pair or (0, 0))[::-1])

    def versions(self) -> list[Item]:
        """Committed versions, by name."""
        return [
            Item(entry.name, f"{ADAPTERS}/{entry.name}", None)
            for entry in self.storage.list(ADAPTERS)
            if entry.is_dir and parse_version_name(entry.name)
        ]

    def outcomes(self) -> dict[str, Outcome]:
        """What became of each step and version that is settled, by name."""
        found = {}
        for entry in self.storage.list(MIRROR):
            mark = parse_mark(entry.name)
            if mark is not None and mark[1] in Outcome.__members__:
                found[mark[0]] = Outcome(mark[1])
        return found

    def queue(self) -> list[Item]:
        """What is still to be mirrored: versions, for which engines wait, then steps by age."""
        settled = self.outcomes()
        return [item for item in (*self.versions(), *self.steps()) if item.name not in settled]

    def settle(self, item: Item, outcome: Outcome) -> None:
        """Mark what became of an item; needs no space on the file system."""
        path = self._place(mark_path(item.name, outcome))
        try:
            path.touch(mode=0o600)
        except OSError as error:
            raise StorageError(f"{path}: cannot be made: {error.strerror}") from error

    def part(self, path: str) -> Part | None:
        """Which of a step's files are here; None: all of them.

        Raises:
            DamagedError: the record does not verify.
        """
        where = f"{path}/{PART}"
        try:
            data = self.storage.read(where)
        except ObjectNotFound:
            return None
        return Part.from_bytes(data, f"{self.storage.url}/{where}")

    # ---- writers

    def record_writer(self, remote: Storage, epoch: int) -> None:
        """Take over the root's record of an epoch.

        Raises:
            StorageError: the root cannot be read.
        """
        self.storage.put(writer_path(epoch), remote.read(writer_path(epoch)))

    def check_run(self, remote: Storage) -> list[Item]:
        """The committed steps, if all of them are of the root's run.

        Raises:
            ConfigError: some are of another run.
            StorageError: the root cannot be read.
        """
        steps = self.steps()
        for epoch in {item.pair[1] for item in steps if item.pair is not None}:
            if not self.same_writer(remote, epoch):
                raise ConfigError(self.foreign(epoch))
        return steps

    def same_writer(self, remote: Storage, epoch: int) -> bool:
        """Whether the tier's record of an epoch is the root's."""
        path = writer_path(epoch)
        try:
            return remote.read(path) == self.storage.read(path)
        except ObjectNotFound:
            return False

    def foreign(self, epoch: int) -> str:
        """The message about an epoch whose record is not the root's."""
        return (
            f"the local tier {self.storage.url} holds steps of another run (its writer {epoch} is "
            f"not that of {self.remote}); give this run a tier of its own, or delete that "
            f"directory. If one of the two records of {writer_path(epoch)} was damaged or lost, "
            "put the other in its place"
        )

    # ---- room

    def evict(self) -> bool:
        """Delete the oldest thing that may go; False if there is none."""
        with self._lock:
            try:
                return any(self._try_drop(item) for item in self._victims())
            except CkptError as error:
                logger.warning("cannot look for room in %s: %s", self.storage.url, error)
                return False

    def prune(self, latest: int, versions: int | None) -> None:
        """After a commit: keep the newest steps and versions, and all that are not settled.

        What fails is logged, not raised: the commit stands.
        """
        with self._lock:
            try:
                settled = self.outcomes()
                steps = {item.pair: item for item in self.steps() if item.pair is not None}
                lineage = committed_lineage(read_writers(self.storage), steps)
                going = [steps[pair] for pair in steps if pair not in lineage[:latest]]
                kept = KEPT_VERSIONS if versions is None else versions
                going += self.versions()[:-kept]
                for item in going:
                    done = settled.get(item.name) in {Outcome.mirrored, Outcome.abandoned}
                    if done and hold(self.storage, item.name) is None:
                        self._try_drop(item)
                self._forget_marks(settled)
            except CkptError as error:
                logger.warning("retention in %s failed: %s", self.storage.url, error)

    def sweep(self) -> None:
        """Finish deletions that a dead process began."""
        for parent in (STEPS, ADAPTERS):
            for entry in self.storage.list(parent):
                if entry.name.startswith(TRASH_PREFIX):
                    self.storage.delete_tree(f"{parent}/{entry.name}")

    def _victims(self) -> Iterable[Item]:
        """What may go, first things first: abandoned steps, mirrored ones by age, versions."""
        settled, steps = self.outcomes(), self.steps()
        wanted = [(Outcome.abandoned, steps), (Outcome.mirrored, [*steps, *self.versions()[:-1]])]
        for outcome, items in wanted:
            for item in items:
                if settled.get(item.name) is outcome and hold(self.storage, item.name) is None:
                    yield item

    def _try_drop(self, item: Item) -> bool:
        """Make an item disappear at once, then delete it; False if somebody else did."""
        trash = trash_path(item.path)
        try:
            self.storage.delete_tree(trash)
            self.storage.rename_dir(item.path, trash)
        except (ObjectNotFound, AlreadyExists):
            return False
        self.storage.delete_tree(trash)
        for outcome in Outcome:
            self.storage.delete(mark_path(item.name, outcome))
        logger.info("%s left the tier %s", item.name, self.storage.url)
        return True

    def _forget_marks(self, settled: Iterable[str]) -> None:
        """Marks whose item is gone: whoever deleted it died in between."""
        there = {item.name for item in (*self.steps(), *self.versions())}
        for name in set(settled) - there:
            for outcome in Outcome:
                self.storage.delete(mark_path(name, outcome))

    def _explain(self) -> str:
        waiting = len(self.queue())
        said = f"; the uploader says: {self.note}" if self.note else ""
        return (
            f"the local tier {self.storage.url} is full: {waiting} step(s) or version(s) in it are "
            f"not mirrored to {self.remote} yet, and what is not mirrored is never dropped{said}"
        )

    # ---- who is at work

    def hold_trainer(self) -> FileLock | None:
        """Show that a trainer uses the tier, until the lock is released or its holder dies."""
        return self._take("trainer.lock", shared=True, wait=True)

    def trainer_alive(self) -> bool:
        """Whether some trainer uses the tier."""
        return not self._is_free("trainer.lock")

    def hold_uploader(self) -> FileLock | None:
        """Become the tier's uploader; None if there is one."""
        return self._take("uploader.lock")

    def uploader_alive(self) -> bool:
        """Whether an uploader is at work, whoever started it."""
        return not self._is_free("uploader.lock")

    def _take(self, name: str, *, shared: bool = False, wait: bool = False) -> FileLock | None:
        try:
            return FileLock.take(self._locks / name, shared=shared, wait=wait)
        except OSError as error:
            raise StorageError(f"{self._locks / name}: {error.strerror}") from error

    def _is_free(self, name: str) -> bool:
        lock = self._take(name)
        if lock is None:
            return False
        lock.release()
        return True

    def _place(self, path: str) -> Path:
        return Path(self.storage.url, path)

    def _join(self) -> str:
        """The tier's id; a new tier is given one."""
        if not self.storage.exists(TIER):  # else it may be full, and this needs space
            body = {"id": uuid.uuid4().hex, "remote": self.remote}
            with contextlib.suppress(AlreadyExists):
                self.storage.put_new(TIER, seal(TIER_FORMAT, SCHEMA, body))
        fields = Fields(
            unseal(self.storage.read(TIER), TIER_FORMAT, SCHEMA, f"{self.storage.url}/{TIER}"),
            f"{self.storage.url}/{TIER}",
        )
        found, remote = fields.text("id", 64), fields.text("remote")
        fields.done()
        if remote != self.remote:
            msg = (
                f"{self.storage.url} is the local tier of {remote}, not of {self.remote}; give "
                f"this run a tier of its own, or finish the other one with `ckpt mirror {remote} "
                f"{self.storage.url}` and delete it"
            )
            raise ConfigError(msg)
        return found


def local_root(url: str | os.PathLike[str]) -> str:
    """The path of a tier that is given as a path or ``file://`` URL.

    Raises:
        ConfigError: another URL.
    """
    text = os.fspath(url)
    parts = urlsplit(text)
    if "://" not in text:
        if not text:
            raise ConfigError("the path of the local tier is empty")
        return text
    if parts.scheme != "file" or parts.netloc not in {"", "localhost"} or not parts.path:
        msg = f"a local tier must be a path or file:///path, got {text!r}"
        raise ConfigError(msg)
    return unquote(parts.path)
