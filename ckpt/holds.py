"""What keeps retention from deleting a step or version: pins, and leases of versions.

A *pin* is a person's word: it holds until it is taken away. A *lease* is a reader's: it holds
for a limited time and is renewed while the reader uses the version, so that one which died
does not keep it for ever. Both are small sealed documents beside the steps. For retention the
name of the file counts: a record that does not verify still holds what it names.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from .envelope import Fields, seal, unseal, utc_now
from .errors import ConfigError, DamagedError, NoCheckpoint, ObjectNotFound
from .layout import (
    LEASES,
    MANIFEST,
    PINS,
    lease_path,
    parse_lease,
    parse_pin,
    parse_version_name,
    pin_path,
    target_dir,
    trash_path,
)
from .storage import Holding, Storage

PIN_FORMAT: Final = "ckpt.pin"
LEASE_FORMAT: Final = "ckpt.lease"
SCHEMA: Final = 1

CLOCK_SKEW_S: Final = 60.0
"""A lease holds this much longer than it says: the clocks of two machines differ."""

MAX_TTL_S: Final = 30 * 24 * 3600.0
_NOTE_MAX: Final = 1000

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pin:
    """A step or version that stays, by its bare name.

    Attributes:
        name: ``step-00000042.w0003`` or ``run7-v00000042``.
        note: why, for people.
        host: machine on which it was pinned.
        created: ISO 8601, UTC.
    """

    name: str
    note: str
    host: str
    created: str


@dataclass(frozen=True, slots=True)
class Lease:
    """A version in use.

    Attributes:
        version: its name.
        holder: who uses it.
        renewed: ISO 8601, UTC: the last sign of life.
        expires: ISO 8601, UTC: until when it holds; None for a record that does not verify.
    """

    version: str
    holder: str
    renewed: str
    expires: str | None

    def live(self, now: datetime) -> bool:
        """Whether it still holds (in doubt, it does)."""
        if self.expires is None:
            return True
        return now < datetime.fromisoformat(self.expires) + timedelta(seconds=CLOCK_SKEW_S)


def pin(storage: Storage, name: str, note: str = "") -> Pin:
    """Keep a step or version until :func:`unpin`; pinning again replaces the note.

    Args:
        storage: the root.
        name: its bare name, as ``ckpt ls`` shows it.
        note: at most 1000 characters.

    Raises:
        ConfigError: no such kind of name, or a note that is too long.
        NoCheckpoint: it does not exist, or was being deleted at this moment.
    """
    path = pin_path(name)
    if len(note) > _NOTE_MAX:
        msg = f"a note has at most {_NOTE_MAX} characters, got {len(note)}"
        raise ConfigError(msg)
    if isinstance(storage, Holding):
        return Pin(name, note, *storage.put_pin(name, note))
    _require(storage, name)
    record = Pin(name, note, socket.gethostname(), utc_now())
    body = {"name": name, "note": note, "host": record.host, "created": record.created}
    storage.put(path, seal(PIN_FORMAT, SCHEMA, body))
    try:
        # Whoever deletes looks for a pin once the target is out of sight, and puts it back: so
        # either that finds this pin, or this finds the target gone.
        _require(storage, name)
    except NoCheckpoint:
        storage.delete(path)
        raise
    return record


def unpin(storage: Storage, name: str) -> bool:
    """Take a pin away; whether there was one.

    Raises:
        ConfigError: neither a step's nor a version's name.
    """
    path = pin_path(name)
    if isinstance(storage, Holding):
        return storage.delete_pin(name)
    there = storage.exists(path)
    storage.delete(path)
    return there


def pinned(storage: Storage) -> set[str]:
    """Bare names of all that is pinned."""
    parsed = (parse_pin(entry.name) for entry in storage.list(PINS) if not entry.is_dir)
    return {name for name in parsed if name is not None}


def read_pin(storage: Storage, name: str) -> Pin | None:
    """The record of a pin, or None if there is none.

    Raises:
        DamagedError: it does not verify (it holds all the same).
    """
    path = pin_path(name)
    where = f"{storage.url}/{path}"
    try:
        body = unseal(storage.read(path), PIN_FORMAT, SCHEMA, where)
    except ObjectNotFound:
        return None
    fields = Fields(body, where)
    record = Pin(
        name=fields.text("name", 200),
        note=fields.text("note", _NOTE_MAX),
        host=fields.text("host", 300),
        created=fields.timestamp("created"),
    )
    fields.done()
    if record.name != name:
        fields.refuse("name", f"must be {name}", record.name)
    return record


def take_lease(storage: Storage, version: str, holder: str, ttl_s: float) -> Lease:
    """Use a version for ``ttl_s`` seconds from now on; called again, it renews.

    Args:
        storage: the root.
        version: name of a committed version.
        holder: unique name of the reader (letters, digits, ``_`` and ``-``).
        ttl_s: seconds; renew well before they are over.

    Raises:
        ConfigError: a name that is none, or a time that is not positive or above 30 days.
        NoCheckpoint: no such version.
    """
    path = lease_path(version, holder)
    if parse_version_name(version) is None:
        msg = f"{version!r} is not a version's name; they are named like 'run7-v00000042'"
        raise ConfigError(msg)
    if not 0 < ttl_s <= MAX_TTL_S:
        msg = f"a lease lasts above 0 and at most {MAX_TTL_S:.0f} s, got {ttl_s!r}"
        raise ConfigError(msg)
    if isinstance(storage, Holding):
        return Lease(version, holder, *storage.take_lease(version, holder, ttl_s))
    _require(storage, version)
    now = datetime.now(UTC)
    lease = Lease(version, holder, _iso(now), _iso(now + timedelta(seconds=ttl_s)))
    body = {
        "version": version,
        "holder": holder,
        "renewed": lease.renewed,
        "expires": lease.expires,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    storage.put(path, seal(LEASE_FORMAT, SCHEMA, body))
    try:
        _require(storage, version)  # as in pin()
    except NoCheckpoint:
        storage.delete(path)
        raise
    return lease


def release_lease(storage: Storage, version: str, holder: str) -> None:
    """Stop using a version; one that is not held is fine.

    Raises:
        ConfigError: a name that is none.
    """
    path = lease_path(version, holder)
    if isinstance(storage, Holding):
        storage.release_lease(version, holder)
    else:
        storage.delete(path)


def list_leases(storage: Storage, version: str | None = None) -> list[Lease]:
    """Every lease, also those that have run out, by version and holder."""
    names = [e.name for e in storage.list(LEASES) if e.is_dir] if version is None else [version]
    found = []
    for name in names:
        for entry in storage.list(f"{LEASES}/{name}"):
            pair = None if entry.is_dir else parse_lease(name, entry.name)
            if pair is not None:
                found.append(_read_lease(storage, *pair))
    return found


def live_leases(leases: Iterable[Lease]) -> list[Lease]:
    """Those that hold at this moment, by this machine's clock."""
    now = datetime.now(UTC)
    return [lease for lease in leases if lease.live(now)]


def _read_lease(storage: Storage, version: str, holder: str) -> Lease:
    path = lease_path(version, holder)
    where = f"{storage.url}/{path}"
    try:
        fields = Fields(unseal(storage.read(path), LEASE_FORMAT, SCHEMA, where), where)
        lease = Lease(
            version=fields.text("version", 100),
            holder=fields.text("holder", 100),
            renewed=fields.timestamp("renewed"),
            expires=fields.timestamp("expires"),
        )
        fields.text("host", 300)
        fields.integer("pid")
        fields.done()
        if (lease.version, lease.holder) != (version, holder):
            fields.refuse("holder", f"must be {holder} of {version}", lease.holder)
    except ObjectNotFound:  # released at this moment
        return Lease(version, holder, "", _iso(datetime.fromtimestamp(0, UTC)))
    except DamagedError as error:
        log.warning("a lease that cannot be read counts as live: %s", error)
        return Lease(version, holder, "", None)
    return lease


def hold(storage: Storage, name: str) -> str | None:
    """Why a step or version may not be deleted right now, or None; asks storage anew."""
    if storage.exists(pin_path(name)):
        return "pinned"
    if parse_version_name(name) is None:
        return None
    holders = [lease.holder for lease in live_leases(list_leases(storage, name))]
    return f"in use by {', '.join(holders)}" if holders else None


class Holds:
    """What is held in a root, by two listings; a lease is read when its version is asked about.

    For decisions about many at once; who deletes asks :func:`hold` again.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pinned = pinned(storage)
        self._leased = {entry.name for entry in storage.list(LEASES) if entry.is_dir}

    def of(self, name: str) -> str | None:
        """Why a step or version may not be deleted, or None."""
        if name in self._pinned:
            return "pinned"
        return hold(self._storage, name) if name in self._leased else None


def remove_unless_held(
    storage: Storage, name: str, held: Callable[[Storage, str], str | None] = hold
) -> str | None:
    """Delete a step or version; a hold on it, also one that appears meanwhile, keeps it.

    It disappears at once (by a rename, or with its manifest), so that no reader takes a
    half-deleted one for a whole one.

    Returns:
        None once it is deleted, or what keeps it.

    Raises:
        StorageError: the store failed.
    """
    reason = held(storage, name) or _take_away(storage, name, held)
    if reason is None and parse_version_name(name) is not None:
        # Leases that ran out, or came too late: the name will never be used again.
        storage.delete_tree(f"{LEASES}/{name}")
    return reason


def _take_away(
    storage: Storage, name: str, held: Callable[[Storage, str], str | None]
) -> str | None:
    path = target_dir(name)
    if storage.has_rename:
        trash = trash_path(path)
        storage.delete_tree(trash)
        storage.rename_dir(path, trash)
        reason = held(storage, name)
        if reason is not None:
            storage.rename_dir(trash, path)
            return reason
        storage.delete_tree(trash)
        return None
    try:
        manifest = storage.read(f"{path}/{MANIFEST}")
    except ObjectNotFound:
        manifest = None
    storage.delete(f"{path}/{MANIFEST}")
    reason = held(storage, name)
    if reason is not None and manifest is not None:
        storage.put_new(f"{path}/{MANIFEST}", manifest)
        return reason
    storage.delete_tree(path)
    return None


def finish_removal(storage: Storage, name: str) -> None:
    """Settle a :func:`remove_unless_held` that a kill cut short; what is whole stays as it is.

    What was out of sight already is deleted, or put back if it is held by now. Only for names whose
    deletion somebody asked for.

    Raises:
        StorageError: the store failed.
    """
    path = target_dir(name)
    if not storage.has_rename:
        if storage.list(path) and not storage.exists(f"{path}/{MANIFEST}"):
            storage.delete_tree(path)
        return
    trash = trash_path(path)
    where = storage.local_path(trash)
    if where is None or not where.is_dir():
        return
    if hold(storage, name) is not None and not storage.list(path):
        storage.rename_dir(trash, path)
    else:
        storage.delete_tree(trash)


def _require(storage: Storage, name: str) -> None:
    path = f"{target_dir(name)}/{MANIFEST}"
    if not storage.exists(path):
        msg = f"{name} does not exist in {storage.url} (no {path}); `ckpt ls` shows what there is"
        raise NoCheckpoint(msg)


def _iso(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
