"""Published versions for those who serve them: find, wait, lease, copy; no server needed.

A root, local or on an object store, is all that a reader and a trainer share. Looking for the
newest version costs the same however many there are: names are listed, and only the newest one's
manifest is read. What a :class:`Version` names never changes, and its name is never used twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Final, TypeAlias

from ckpt.errors import (
    ConfigError,
    DamagedError,
    HandoffTimeout,
    NoCheckpoint,
    StorageError,
)
from ckpt.holds import Lease, list_leases, live_leases, release_lease, take_lease
from ckpt.layout import (
    MANIFEST,
    check_name,
    check_run_name,
    parse_version_name,
    version_name,
)
from ckpt.manifest import VersionManifest
from ckpt.storage import Announcing, Storage, open_storage
from ckpt.versions import VersionEntry, version_entry, version_names

from .pull import pull_version
from .version import Version

__all__ = ["LOCAL_POLL_S", "REMOTE_POLL_S", "Registry", "Version", "Which"]

LOCAL_POLL_S: Final = 0.02
REMOTE_POLL_S: Final = 0.25
"""Between two looks at an object store: one listing each."""

log = logging.getLogger(__name__)


Which: TypeAlias = int | str | Version
"""A version by its number, its exact name, or itself."""


class Registry:
    """The versions of a root, for readers.

    Wherever a version is asked for, its number, its name or itself will do. A number needs to know
    the run: the one given here, or the only one that has versions in the root.

    Args:
        root: path or URL of the run's root, or its open store.
        run: first part of the versions' names, if the root may hold several.
        storage_options: for the store, if ``root`` is a URL.

    Raises:
        ConfigError: an unusable root, run or option.
    """

    def __init__(
        self,
        root: str | PathLike[str] | Storage,
        *,
        run: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(root, str | PathLike):
            self._storage = open_storage(root, storage_options)
        elif storage_options:
            raise ConfigError("storage_options are for a URL; this root is an open store already")
        else:
            self._storage = root
        self._run = None if run is None else check_run_name(run)
        self._warned: set[str] = set()
        self._looked_up: VersionManifest | None = None

    @property
    def url(self) -> str:
        """The root, fit for a message."""
        return self._storage.url

    @property
    def storage(self) -> Storage:
        """The root's store."""
        return self._storage

    def latest(self, run: str | None = None) -> Version | None:
        """The newest version whose manifest and sizes verify, or None if there is none.

        One listing, and the reads of one version; only what is damaged or unfinished costs more.

        Args:
            run: instead of the registry's own.

        Raises:
            ConfigError: the root has versions of several runs, and none is named.
            StorageError: the store failed.
        """
        if isinstance(self._storage, Announcing):
            return self._announced(self._storage.newest(run or self._run))
        return self._newest(run, -1)

    def get(self, v: Which) -> Version:
        """A committed version.

        Raises:
            ConfigError: neither a number nor a version's exact name.
            NoCheckpoint: it was never committed, or it was deleted.
            DamagedError: its manifest or probe does not verify, or a file has another size.
            StorageError: the store failed.
        """
        manifest = self._manifest(v)
        self._looked_up = manifest  # a manifest never changes
        return Version.of(manifest, self.url)

    def newer_than(self, v: Which | None) -> list[Version]:
        """The versions above ``v`` that are whole, oldest first; None stands below all.

        Raises:
            ConfigError, StorageError: as :meth:`latest`.
        """
        run, floor = self._floor(v)
        found = (self._whole(*pair) for pair in self._committed_names(run, floor))
        return [version for version in found if version is not None]

    def wait_for(
        self, newer_than: Which | None, *, timeout: float, poll_s: float | None = None
    ) -> Version:
        """The newest version above another, as soon as there is one.

        A store that fails meanwhile is asked again until the time is over.

        Args:
            newer_than: what is served now; None waits for the first version.
            timeout: seconds; 0 looks once. A request that is under way then is not cut off: its own
                bounds are the store's.
            poll_s: seconds between two looks, each of which is one listing; by default
                0.02 on a file system and 0.25 elsewhere.

        Raises:
            HandoffTimeout: none in time; its cause is the store's last error, if there was one.
            ConfigError: as :meth:`latest`, or a negative time.
        """
        if timeout < 0 or (poll_s is not None and poll_s <= 0):
            msg = f"want timeout >= 0 and poll_s > 0, got {timeout!r} and {poll_s!r}"
            raise ConfigError(msg)
        if poll_s is None:
            local = self._storage.local_path("") is not None
            poll_s = LOCAL_POLL_S if local else REMOTE_POLL_S
        deadline = time.monotonic() + timeout
        run, floor = self._floor(newer_than)
        while True:
            problem: StorageError | None = None
            try:
                if isinstance(self._storage, Announcing):
                    left = max(0.0, deadline - time.monotonic())
                    found = self._announced(self._storage.newer(run, floor, left))
                else:
                    found = self._newest(run, floor)
            except StorageError as error:
                log.warning("cannot look for new versions, trying again: %s", error)
                found, problem = None, error
            if found is not None:
                return found
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._too_late(run, floor, timeout, problem) from problem
            time.sleep(min(poll_s, left))

    def lease(self, v: Which, holder: str, ttl_s: float) -> Lease:
        """Keep a version from being deleted for ``ttl_s`` seconds from now; again renews.

        Args:
            v: the version.
            holder: unique name of the reader (letters, digits, ``_`` and ``-``).
            ttl_s: seconds, at most 30 days; renew well before they are over.

        Raises:
            ConfigError: a name or a time that is none.
            NoCheckpoint: no such version, or it was being deleted at this moment.
            StorageError: the store failed.
        """
        return take_lease(self._storage, self._name(v), holder, ttl_s)

    def release(self, v: Which, holder: str) -> None:
        """Give a lease back; one that is not held is fine.

        Raises:
            ConfigError: a name that is none.
            StorageError: the store failed.
        """
        release_lease(self._storage, self._name(v), holder)

    def leases(self, v: Which) -> list[Lease]:
        """The leases that keep a version now, by holder.

        Raises:
            ConfigError: a name that is none.
            StorageError: the store failed.
        """
        return live_leases(list_leases(self._storage, self._name(v)))

    def fetch(self, v: Which, into: str | PathLike[str]) -> Path:
        """Copy a version to this machine: every byte verified, all of it or nothing to be seen.

        Take a lease first, or a version that is old enough may be deleted meanwhile.

        Args:
            v: the version.
            into: a local directory, made if it is missing. The version becomes a directory of its
                own name in it: a PEFT adapter with its manifest. One that is there already
                and verifies is kept as it is; a damaged one is replaced in one step.

        Returns:
            The version's directory.

        Raises:
            ConfigError: ``into`` is a file or a URL, or no such kind of version.
            NoCheckpoint: no such version, or it was deleted meanwhile.
            DamagedError: bytes that do not verify; nothing is left at the target.
            AlreadyExists: something at the target that is no version.
            StorageError: one of the two stores failed.
        """
        return pull_version(self._storage, self._manifest(v), into)

    def place(self, v: Version, into: str | PathLike[str]) -> Path:
        """As :meth:`fetch`, for a cache that verifies what it holds before it first uses it.

        Nothing is synced, and on the root's own file system the weights are a hard link: nobody
        may change the files, neither here nor there.

        Args:
            v: a version that this registry has just looked up.
            into: the cache's directory.

        Raises:
            NoCheckpoint, DamagedError, AlreadyExists, StorageError: as :meth:`fetch`.
        """
        known = self._looked_up
        manifest = known if known is not None and known.name == v.name else self._manifest(v)
        return pull_version(self._storage, manifest, into, place=True)

    def close(self) -> None:
        """Release the store's connections; a later call opens new ones."""
        self._storage.close()

    def _manifest(self, v: Which) -> VersionManifest:
        name = self._name(v)
        run, number = self._pair(name)
        entry = version_entry(self._storage, run, number)
        if entry.state == "committed" and entry.manifest is not None:
            return entry.manifest
        if entry.state == "damaged" and self._present(entry):
            raise DamagedError(f"version {name} is damaged: {entry.problem}")
        msg = f"there is no committed version {name} in {self.url}"
        raise NoCheckpoint(f"{msg}; `ckpt versions` shows what there is")

    def _announced(self, sealed: bytes | None) -> Version | None:
        """The version whose manifest a store has sent by itself."""
        if sealed is None:
            return None
        manifest = VersionManifest.from_bytes(sealed, f"{self.url}: the newest version")
        self._looked_up = manifest
        return Version.of(manifest, self.url)

    def _newest(self, run: str | None, floor: int) -> Version | None:
        for pair in reversed(self._committed_names(run, floor)):
            version = self._whole(*pair)
            if version is not None:
                return version
        return None

    def _committed_names(self, run: str | None, floor: int) -> list[tuple[str, int]]:
        """By one listing: versions above ``floor`` that have a directory, in order."""
        names = version_names(self._storage)
        run = self._only_run({pair[0] for pair in names}, run)
        return [pair for pair, dir_ in names.items() if dir_ and pair[0] == run and pair[1] > floor]

    def _only_run(self, present: set[str], run: str | None) -> str | None:
        wanted = run if run is not None else self._run
        if wanted is None and len(present) > 1:
            shown = ", ".join(sorted(present)[:5])
            msg = f"{self.url} holds versions of several runs ({shown}); name the one that is meant"
            raise ConfigError(msg)
        return wanted if wanted is not None else next(iter(present), None)

    def _whole(self, run: str, number: int) -> Version | None:
        """The version, or None for what is unfinished, just being deleted, or damaged."""
        entry = version_entry(self._storage, run, number)
        problem = entry.problem
        if entry.state == "committed" and entry.manifest is not None:
            try:
                return Version.of(entry.manifest, self.url)
            except DamagedError as error:
                problem = str(error)
        if problem is not None and entry.name not in self._warned and self._present(entry):
            self._warned.add(entry.name)  # once, not at every look
            log.warning("version %s is damaged and passed over: %s", entry.name, problem)
        return None

    def _present(self, entry: VersionEntry) -> bool:
        # Who deletes takes the manifest away first; what then looks damaged is only gone.
        return self._storage.exists(f"{entry.path}/{MANIFEST}")

    def _floor(self, v: Which | None) -> tuple[str | None, int]:
        if v is None:
            return self._run, -1
        if isinstance(v, int):
            return self._run, v
        return self._pair(self._name(v))

    def _pair(self, name: str) -> tuple[str, int]:
        pair = parse_version_name(name)
        if pair is None:
            raise ConfigError(
                f"{name!r} is not a version's exact name; they are named like 'run7-v00000042', "
                "and there are no moving names"
            )
        return pair

    def _name(self, v: Which) -> str:
        if isinstance(v, Version):
            return v.name
        if isinstance(v, str):
            self._pair(check_name("version name", v))
            return v
        run = self._run
        if run is None:
            run = self._only_run({pair[0] for pair in version_names(self._storage)}, None)
        if run is None:
            raise NoCheckpoint(f"there is no version {v} in {self.url}, nor any other")
        return version_name(run, v)

    def _too_late(
        self, run: str | None, floor: int, timeout: float, problem: StorageError | None
    ) -> HandoffTimeout:
        what = "no version" if run is None else f"no version of {run!r}"
        above = "" if floor < 0 else f" above {floor}"
        reason = "" if problem is None else f"; the store failed: {problem}"
        return HandoffTimeout(f"{what}{above} in {self.url} within {timeout:g} s{reason}")
