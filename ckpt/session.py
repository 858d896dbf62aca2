"""What a trainer and the uploader of its tier tell each other, in files of the tier.

The trainer writes a *session*: what is to be mirrored where, and under which rule it is kept
there. No credential is in it: those travel in the uploader's environment. The uploader writes a
*heartbeat*, in place and always of the same length, so that it needs no space on a full disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from .envelope import Fields, seal, unseal
from .errors import ConfigError, ObjectNotFound
from .layout import MIRROR
from .storage.base import Storage
from .types import Retention

SESSION: Final = f"{MIRROR}/session.json"
SESSION_FORMAT: Final = "ckpt.session"
SCHEMA: Final = 1

OPTIONS_VARIABLE: Final = "ARCHON_CKPT_STORAGE_OPTIONS"
"""Environment variable of the uploader: the root's storage options as JSON."""

_SUFFIX: Final = 8
_BEAT_BYTES: Final = 4096
_NOTE_CHARACTERS: Final = 600


@dataclass(frozen=True, slots=True)
class Session:
    """One manager's use of a tier.

    Attributes:
        id: unlike that of any other manager; an uploader of another session hands over.
        remote: URL of the root.
        run: first part of the names of published versions.
        retention: what is kept at the root.
    """

    id: str
    remote: str
    run: str
    retention: Retention

    @property
    def nonce(self) -> str:
        """What the attempts of this manager begin with."""
        return self.id[:-_SUFFIX]

    @classmethod
    def begin(cls, nonce: str, remote: str, run: str, retention: Retention) -> Session:
        """The session of a manager that begins."""
        return cls(f"{nonce}{uuid.uuid4().hex[:_SUFFIX]}", remote, run, retention)

    def save(self, storage: Storage) -> None:
        """Write it into the tier; replaces the one before."""
        body = {"id": self.id, "remote": self.remote, "run": self.run}
        storage.put(
            SESSION, seal(SESSION_FORMAT, SCHEMA, {**body, "retention": asdict(self.retention)})
        )

    @classmethod
    def load(cls, storage: Storage) -> Session | None:
        """The tier's session, or None if no manager ever used it.

        Raises:
            DamagedError: it does not verify.
            ConfigError: its retention is not one that this version knows.
        """
        where = f"{storage.url}/{SESSION}"
        try:
            data = storage.read(SESSION)
        except ObjectNotFound:
            return None
        found = Fields(unseal(data, SESSION_FORMAT, SCHEMA, where), where)
        return cls(
            found.text("id", 64),
            found.text("remote"),
            found.text("run", 100),
            _retention(found.json("retention"), where),
        )


def _retention(value: Mapping[str, Any], where: str) -> Retention:
    known = {field.name for field in fields(Retention)}
    if not known.issuperset(value):
        msg = f"{where}: unknown retention {sorted(set(value) - known)}"
        raise ConfigError(msg)
    return Retention(**value)


@dataclass(frozen=True, slots=True)
class Beat:
    """An uploader's sign of life.

    Attributes:
        pid: its process id.
        session: id of the session that it works for.
        state: ``starting``, ``idle``, ``uploading``, ``waiting`` (for other nodes' parts),
            ``retrying`` (the root did not answer) or ``ended``.
        queue: steps and versions that are not settled.
        current: what is on its way, or None.
        sent_bytes: bytes read and sent since it started.
        requests: requests that it sent to the root since it started, repetitions included.
        mirrored: steps and versions that it settled since it started.
        problem: what went wrong last, or None.
        superseded: the newer writer that has taken over the root, or None.
        moved: seconds since 1970 when it last got anywhere (a block read, a look at the queue).
        at: seconds since 1970 when it was written; a thread of its own sees to that.
    """

    pid: int
    session: str
    state: str
    queue: int = 0
    current: str | None = None
    sent_bytes: int = 0
    requests: int = 0
    mirrored: int = 0
    problem: str | None = None
    superseded: int | None = None
    moved: float = 0.0
    at: float = 0.0

    @property
    def age(self) -> float:
        """Seconds since it was written."""
        return max(0.0, time.time() - self.at)

    @property
    def stuck(self) -> float:
        """Seconds between the last sign of life and the last progress before it."""
        return max(0.0, self.at - self.moved)


def _beat_path(tier: Path) -> Path:
    return tier / MIRROR / "uploader.json"


def write_beat(tier: Path, beat: Beat) -> None:
    """Put a heartbeat into the tier; a disk that refuses it is no reason to stop uploading."""
    document = asdict(beat) | {"at": time.time()}
    if beat.problem is not None:
        document["problem"] = beat.problem[:_NOTE_CHARACTERS]
    data = json.dumps(document).encode().ljust(_BEAT_BYTES)[:_BEAT_BYTES]
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(OSError):
        descriptor = os.open(_beat_path(tier), flags, 0o600)
        try:
            os.pwrite(descriptor, data, 0)
        finally:
            os.close(descriptor)


def read_beat(tier: Path) -> Beat | None:
    """The last heartbeat, or None if there is none or it is being written just now."""
    try:
        beat = Beat(**json.loads(_beat_path(tier).read_bytes()))
        numbers = (
            beat.pid,
            beat.queue,
            beat.sent_bytes,
            beat.requests,
            beat.superseded or 0,
            beat.moved,
            beat.at,
        )
        return beat if all(isinstance(n, int | float) for n in numbers) else None
    except (OSError, ValueError, TypeError):
        return None
