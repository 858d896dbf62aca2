"""What a sidecar says of its engines, as a small record in the root: a hint for people.

Who uses which version is known from the leases, which count. These records only say more: which
engine has proven what, and how far it is behind. Nothing is decided by them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from ckpt.envelope import Fields, seal, unseal
from ckpt.errors import DamagedError, ObjectNotFound
from ckpt.layout import MAX_VERSION, REPLICAS, parse_replica, parse_version_name, replica_path
from ckpt.storage import Storage
from ckpt.storage.redact import public_url
from ckpt.timeline import one_line

REPLICAS_FORMAT: Final = "ckpt.replicas"
SCHEMA: Final = 1
MAX_BYTES: Final = 256 * 1024
MAX_FILES: Final = 256
MAX_ENGINES: Final = 64
MAX_PASSED_OVER: Final = 16

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """One engine.

    Attributes:
        url: its address, without credentials.
        up: whether it answered last.
        live: the version that is proven there, or None.
        proof: on what the last proof rests: ``expected``, ``difference``, ``no effect``, or None.
        proved: when that was: ISO 8601, UTC, or None.
        problem: what is wrong, or None.
    """

    url: str
    up: bool
    live: str | None
    proof: str | None
    proved: str | None
    problem: str | None


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """What one sidecar said last.

    Attributes:
        holder: in whose name it holds leases.
        run: what it serves.
        host: its machine.
        at: when it was written: ISO 8601, UTC.
        every_s: it is written again after so many seconds at the latest.
        stopped: whether the sidecar has ended; its engines may go on.
        current: the version that is live, or None.
        newest: number of the newest version that it saw at the root, or None.
        engines: its engines.
        passed_over: versions that it left out, and why.
    """

    holder: str
    run: str
    host: str
    at: str
    every_s: float
    stopped: bool
    current: str | None
    newest: int | None
    engines: tuple[EngineRecord, ...]
    passed_over: tuple[tuple[str, str], ...] = ()

    def age_s(self, now: datetime | None = None) -> float:
        """Seconds since it was written, by this machine's clock."""
        moment = datetime.fromisoformat(self.at)
        return ((now or datetime.now(UTC)) - moment).total_seconds()

    def stale(self, now: datetime | None = None) -> bool:
        """Whether it should have been written again by now, or is from the future."""
        age = self.age_s(now)
        return age > 3 * self.every_s or age < -3600

    def same_as(self, other: ReplicaRecord | None) -> bool:
        """Whether two say the same, their moments apart."""
        return other is not None and replace(self, at=other.at) == other

    def to_bytes(self) -> bytes:
        """The file's content."""
        body = {
            "holder": self.holder,
            "run": self.run,
            "host": self.host,
            "at": self.at,
            "every_s": float(self.every_s),
            "stopped": self.stopped,
            "current": self.current,
            "newest": self.newest,
            "engines": [
                {
                    "url": public_url(one.url)[:300],
                    "up": one.up,
                    "live": one.live,
                    "proof": one.proof,
                    "proved": one.proved,
                    "problem": None if one.problem is None else one_line(one.problem),
                }
                for one in self.engines[:MAX_ENGINES]
            ],
            "passed_over": [
                {"version": name, "reason": one_line(reason)}
                for name, reason in self.passed_over[:MAX_PASSED_OVER]
            ],
        }
        return seal(REPLICAS_FORMAT, SCHEMA, body)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ReplicaRecord:
        """Read a record.

        Raises:
            DamagedError: it is none, or it breaks a bound.
        """
        if len(data) > MAX_BYTES:
            raise DamagedError(f"{where} has {len(data)} bytes; it may have {MAX_BYTES}")
        fields = Fields(unseal(data, REPLICAS_FORMAT, SCHEMA, where), where)
        every_s = fields.raw("every_s")
        if not isinstance(every_s, float) or not 0 < every_s <= 86400:
            fields.refuse("every_s", "must be seconds, above 0 and at most a day", every_s)
        record = cls(
            holder=fields.text("holder", 100),
            run=fields.text("run", 100),
            host=fields.text("host", 300),
            at=fields.timestamp("at"),
            every_s=every_s,
            stopped=_boolean(fields, "stopped"),
            current=_version(fields, "current"),
            newest=fields.optional("newest", lambda name: fields.integer(name, 0, MAX_VERSION)),
            engines=tuple(_engine(one) for one in _objects(fields, "engines", MAX_ENGINES)),
            passed_over=tuple(
                _passed_over(one) for one in _objects(fields, "passed_over", MAX_PASSED_OVER)
            ),
        )
        fields.done()
        return record


def _objects(fields: Fields, name: str, limit: int) -> list[Fields]:
    found = fields.objects(name)
    if len(found) > limit:
        fields.refuse(name, f"must have at most {limit} entries", len(found))
    return found


def _boolean(fields: Fields, name: str) -> bool:
    value: Any = fields.raw(name)
    if not isinstance(value, bool):
        fields.refuse(name, "must be true or false", value)
    return value


def _version(fields: Fields, name: str) -> str | None:
    value = fields.optional(name, lambda member: fields.text(member, 100))
    if value is not None and parse_version_name(value) is None:
        fields.refuse(name, "must be a version's name", value)
    return value


def _engine(fields: Fields) -> EngineRecord:
    one = EngineRecord(
        url=fields.text("url", 300),
        up=_boolean(fields, "up"),
        live=_version(fields, "live"),
        proof=fields.optional("proof", lambda name: fields.text(name, 32)),
        proved=fields.optional("proved", fields.timestamp),
        problem=fields.optional("problem", lambda name: fields.text(name, 500)),
    )
    fields.done()
    return one


def _passed_over(fields: Fields) -> tuple[str, str]:
    pair = (_version(fields, "version") or "", fields.text("reason", 500))
    fields.done()
    return pair


def read_replicas(storage: Storage) -> list[ReplicaRecord]:
    """What all sidecars said last, by holder; at most :data:`MAX_FILES` of them.

    What cannot be read is passed over, with a line in the log.

    Raises:
        StorageError: the store failed.
    """
    found = []
    for entry in storage.list(REPLICAS)[:MAX_FILES]:
        holder = None if entry.is_dir else parse_replica(entry.name)
        if holder is None or entry.size > MAX_BYTES:
            continue
        try:
            found.append(_read(storage, holder))
        except ObjectNotFound:
            continue
        except DamagedError as error:
            log.warning("what a sidecar says is passed over: %s", error)
    return found


def _read(storage: Storage, holder: str) -> ReplicaRecord:
    path = replica_path(holder)
    where = f"{storage.url}/{path}"
    record = ReplicaRecord.from_bytes(storage.read(path), where)
    if record.holder != holder:
        raise DamagedError(f"{where} is that of {record.holder!r}")
    return record
