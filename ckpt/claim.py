"""Version numbers: each is claimed by an exclusive create before anything is written under it.

A number is given out once. What proves that is the *highest* claim of a run: it is never deleted,
so whoever finds nothing above the number that he has just claimed got one that is new. Claims below
it only tell people and retention whose work is under way.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from .envelope import Fields, seal, unseal, utc_now
from .errors import AlreadyExists, CommitUnknown, ObjectNotFound, PublishError, StorageError
from .layout import (
    ADAPTERS,
    MAX_EPOCH,
    MAX_VERSION,
    claim_path,
    new_attempt,
    parse_claim,
    parse_version_name,
    version_name,
)
from .record_codec import parse_attempt
from .storage.base import Entry, Storage

CLAIM_FORMAT: Final = "ckpt.claim"
CLAIM_SCHEMA: Final = 1
_UNCLEAR_ANSWERS: Final = 3
"""So many numbers in a row whose claim nobody can tell the fate of: then the store is at fault."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who may write a version.

    Attributes:
        name: the version's name.
        epoch: the writer's epoch.
        attempt: id of the try.
        created: ISO 8601, UTC, by the writer's clock.
    """

    name: str
    epoch: int
    attempt: str
    created: str

    def age_s(self) -> float:
        """Seconds since it was made, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.created)).total_seconds()


def claim_number(
    storage: Storage, run: str, epoch: int, attempt: str, *, after: int | None = None
) -> int:
    """Take the run's next number; who loses a race for one tries the one above it.

    Args:
        storage: the run's root.
        run: its name.
        epoch: the writer's epoch.
        attempt: id of the try.
        after: the number that the caller took last, which saves the first look: whatever became
            of the numbers above it meanwhile, the look after the claim shows it.

    Raises:
        PublishError: the run has no numbers left.
        StorageError: the store failed, or left open time and again whether a claim was made.
    """
    known = after is not None
    number = 1 + (after if after is not None else _highest(storage, run))
    unclear = 0
    while number <= MAX_VERSION:
        body = {
            "name": version_name(run, number),
            "epoch": epoch,
            "attempt": attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": utc_now(),
            # No two claims have equal bytes, so reading one back tells whose it is.
            "nonce": new_attempt(),
        }
        try:
            storage.put_new(claim_path(run, number), seal(CLAIM_FORMAT, CLAIM_SCHEMA, body))
        except AlreadyExists:
            # Somebody was faster, by one number or, since the caller's last look, by many.
            if known:
                known, number = False, _highest(storage, run)
        except CommitUnknown as error:
            # It may have left a claim of ours behind: that number is lost, not shared.
            unclear += 1
            if unclear == _UNCLEAR_ANSWERS:
                msg = f"whether a number was claimed stayed open {unclear} times: {error}"
                raise StorageError(msg) from error
        else:
            # If this process slept since it looked, the number may have been published and deleted
            # with its claim meanwhile. Then a higher one is taken.
            highest = max(number, _highest(storage, run))
            if highest <= number:
                return number
            storage.delete(claim_path(run, number))
            number = highest
        number += 1
    raise PublishError(f"run {run!r} has used up its {MAX_VERSION} version numbers; rename it")


def read_claim(storage: Storage, run: str, number: int) -> Claim | None:
    """The claim of a number, or None if there is none.

    Raises:
        DamagedError: it does not verify.
        StorageError: the store failed.
    """
    path = claim_path(run, number)
    where = f"{storage.url}/{path}"
    try:
        fields = Fields(unseal(storage.read(path), CLAIM_FORMAT, CLAIM_SCHEMA, where), where)
    except ObjectNotFound:
        return None
    claim = Claim(
        name=fields.text("name", 100),
        epoch=fields.integer("epoch", 1, MAX_EPOCH),
        attempt=parse_attempt(fields),
        created=fields.timestamp("created"),
    )
    for name, limit in (("host", 300), ("nonce", 200)):
        fields.text(name, limit)
    fields.integer("pid")
    fields.done()
    if claim.name != version_name(run, number):
        fields.refuse("name", f"must be {version_name(run, number)}", claim.name)
    return claim


def _highest(storage: Storage, run: str) -> int:
    return max(_numbers(storage.list(ADAPTERS), run), default=0)


def _numbers(entries: Iterable[Entry], run: str) -> set[int]:
    """Every number of the run that a claim or a directory shows as taken."""
    parsed = (
        parse_version_name(entry.name) if entry.is_dir else parse_claim(entry.name)
        for entry in entries
    )
    return {pair[1] for pair in parsed if pair is not None and pair[0] == run}
