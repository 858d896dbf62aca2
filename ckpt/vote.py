"""Agreement over ranks with deadlines: notes on a shared board, and one decision by rank 0.

Every exchange has a topic. Each rank puts its answer or its error there; rank 0 gathers them and
puts the decision. All waits poll with a deadline and watch for the sign that the exchange is
over, so a rank that raised, died or hangs holds nobody past it, and a late rank finds the
decision and obeys.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from . import errors
from .errors import CkptError, PlanError, SaveAborted, VoteTimeout

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.0005
_LONGEST_PAUSE = 0.05

_PART_BYTES = 4 * 1024 * 1024
"""Larger notes are split: torch's store refuses values of 8 MiB and more."""

_VERDICTS = frozenset(
    {
        errors.BaseMismatch,
        errors.CommitUnknown,
        errors.ConfigError,
        errors.DamagedError,
        errors.NoCheckpoint,
        errors.PlanError,
        errors.StateError,
        errors.StepExists,
        errors.Superseded,
        errors.UnrestoredRoot,
    }
)
"""Errors that mean the same on every rank and keep their class; the others become SaveAborted."""

_TRANSPORT = (RuntimeError, OSError)
"""What a store raises when its server is gone (torch's DistNetworkError is a RuntimeError)."""


class NoteStore(Protocol):
    """What of a ``torch.distributed`` store is used; its methods block only for a round trip."""

    def set(self, key: str, value: str, /) -> None:
        """Put a value; the last one stays."""
        ...

    def get(self, key: str, /) -> bytes:
        """The value of a key that is there."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all of the keys are there."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Remove a key if it is there."""
        ...


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way to other ranks.

    Attributes:
        kind: name of its class.
        message: its text.
        rank: where it happened.
        echo: it was raised once already on every rank; this only says that the rank which
            raised it did not take part in the next exchange.
    """

    kind: str
    message: str
    rank: int
    echo: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int, *, echo: bool = False) -> Failure:
        """Describe an error of this rank."""
        if isinstance(error, RemoteFailure):
            return error.failure
        return cls(type(error).__name__, str(error) or repr(error), rank, echo)

    def to_json(self) -> dict[str, Any]:
        """The form in which it is put on the board."""
        return asdict(self)

    def rebuild(self, *, keep: bool = False) -> CkptError:
        """The error as every rank reports it.

        Args:
            keep: keep the class of any of our errors. Otherwise only of those that mean the
                same on every rank; the rest becomes SaveAborted with the rank and the cause.
        """
        message = f"rank {self.rank}: {self.message}"
        known = getattr(errors, self.kind, None)
        if not (isinstance(known, type) and issubclass(known, CkptError)):
            known = None
        if known is not None and (keep or issubclass(known, SaveAborted) or known in _VERDICTS):
            return known(message)
        return SaveAborted(f"rank {self.rank}: {self.kind}: {self.message}")


class RemoteFailure(Exception):
    """Another rank's failure, on its way through rank 0's error handling."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass(frozen=True, slots=True)
class Verdict:
    """Rank 0's decision: a value, or the failure that all ranks report."""

    value: Any = None
    failure: Failure | None = None


class Board:
    """One thread's access to the ranks' store.

    Args:
        store: a connection that no other thread uses at the same time.
        rank: this rank.
        world: number of ranks.
        timeout: seconds that rank 0 waits for the others' answers. The others wait twice that
            for the decision, because rank 0 may itself wait that long before it commits.
    """

    def __init__(self, store: NoteStore, rank: int, world: int, timeout: float) -> None:
        self._store = store
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self._parts: dict[str, int] = {}

    def answer(self, topic: str, value: Any) -> None:
        """Put this rank's answer (JSON-like).

        Raises:
            SaveAborted: rank 0's store is gone.
        """
        self._put(f"{topic}/answer/{self.rank}", value)

    def fail(self, topic: str, error: BaseException, *, echo: bool = False) -> None:
        """Put this rank's error in the place of its answer."""
        self._put(f"{topic}/failed", Failure.of(error, self.rank, echo=echo).to_json())

    def mark(self, topic: str) -> None:
        """Say that a rank takes this path (see ``gather``'s ``contrary``)."""
        self._put(f"{topic}/mark", None)

    def gather(self, topic: str, *, contrary: str | None = None) -> list[Any]:
        """Rank 0: every rank's answer, by rank.

        Args:
            topic: the exchange.
            contrary: a path that no rank may take if all are to agree.

        Raises:
            RemoteFailure: a rank put an error.
            PlanError: a rank took the contrary path.
            VoteTimeout: names the ranks that did not answer in time.
        """
        keys = [f"{topic}/answer/{rank}" for rank in range(self.world)]
        deadline = time.monotonic() + self.timeout
        for pause in _pauses(deadline):
            if self._check([f"{topic}/failed"]):
                raise RemoteFailure(Failure(**self._get(f"{topic}/failed")))
            if self._check(keys):
                return [self._get(key) for key in keys]
            if contrary is not None and self._check([f"{contrary}/mark"]):
                msg = "ranks disagree: the layout of the saved state changed on some ranks only"
                raise PlanError(msg)
            time.sleep(pause)
        late = [str(rank) for rank, key in enumerate(keys) if not self._check([key])]
        msg = (
            f"rank {', '.join(late)} did not answer within {self.timeout:g} s "
            f"(dead, hung, or in another call)"
        )
        raise VoteTimeout(msg)

    def peek(self, topic: str, rank: int) -> Any:
        """A rank's answer if it is there already, else None."""
        key = f"{topic}/answer/{rank}"
        return self._get(key) if self._check([key]) else None

    def decide(self, topic: str, value: Any) -> None:
        """Rank 0: put the decision that all ranks follow."""
        self._put(f"{topic}/decision", {"value": value})

    def abort(self, topic: str, error: BaseException, *, echo: bool = False) -> Failure:
        """Rank 0: put the error that all ranks report; returns it."""
        failure = Failure.of(error, self.rank, echo=echo)
        self._put(f"{topic}/decision", {"failure": failure.to_json()})
        return failure

    def verdict(self, topic: str) -> Verdict:
        """Every other rank: wait for rank 0's decision.

        Raises:
            VoteTimeout: rank 0 decided nothing in time; the exchange may still succeed.
            SaveAborted: rank 0's store is gone.
        """
        wait = 2 * self.timeout
        for pause in _pauses(time.monotonic() + wait):
            if self.decided(topic):
                found = self._get(f"{topic}/decision")
                failure = found.get("failure")
                return Verdict(found.get("value"), None if failure is None else Failure(**failure))
            time.sleep(pause)
        msg = f"rank 0 decided nothing within {wait:g} s (dead or hung)"
        raise VoteTimeout(msg)

    def decided(self, topic: str) -> bool:
        """Whether the decision is there already (the others went on without this rank)."""
        return self._check([f"{topic}/decision"])

    def forget(self, topics: Iterable[str]) -> None:
        """Rank 0: drop topics that every rank is done with, so that the store stays small."""
        for topic in topics:
            keys = [f"{topic}/answer/{rank}" for rank in range(self.world)]
            for key in (*keys, f"{topic}/failed", f"{topic}/mark", f"{topic}/decision"):
                self._store.delete_key(key)
                for number in range(1, self._parts.pop(key, 1)):
                    self._store.delete_key(f"{key}/part/{number}")

    def farewell(self, timeout: float) -> None:
        """Leave; rank 0, whose store dies with it, first waits until all others have left."""
        key = f"farewell/answer/{self.rank}"
        if self.rank != 0:
            # A failed rank 0 may be gone already; leaving needs nothing from it.
            with contextlib.suppress(SaveAborted):
                self._put(key, None)
            return
        keys = [f"farewell/answer/{rank}" for rank in range(1, self.world)]
        for pause in _pauses(time.monotonic() + timeout):
            if not keys or self._check(keys):
                return
            time.sleep(pause)
        late = [key.rpartition("/")[2] for key in keys if not self._check([key])]
        logger.warning(
            "rank %s did not close its checkpoint manager within %g s", ", ".join(late), timeout
        )

    def _put(self, key: str, value: Any) -> None:
        data = json.dumps(value, separators=(",", ":"))
        parts = [data[at : at + _PART_BYTES] for at in range(0, len(data), _PART_BYTES)]
        try:
            # The key itself comes last: who sees it finds every part.
            for number, part in enumerate(parts[1:], 1):
                self._store.set(f"{key}/part/{number}", part)
            self._store.set(key, f"{len(parts)}:{parts[0]}")
        except _TRANSPORT as error:
            raise self._gone(error) from error

    def _get(self, key: str) -> Any:
        try:
            count, _, data = self._store.get(key).decode("ascii").partition(":")
            self._parts[key] = int(count)
            for number in range(1, int(count)):
                data += self._store.get(f"{key}/part/{number}").decode("ascii")
        except _TRANSPORT as error:
            raise self._gone(error) from error
        return json.loads(data)

    def _check(self, keys: list[str]) -> bool:
        try:
            return bool(self._store.check(keys))
        except _TRANSPORT as error:
            raise self._gone(error) from error

    def _gone(self, error: Exception) -> SaveAborted:
        text = str(error).partition("\n")[0]
        return SaveAborted(f"rank 0 and its store are gone (seen by rank {self.rank}): {text}")


def _pauses(deadline: float) -> Iterable[float]:
    """Growing pauses between polls until the deadline; at least one poll is made."""
    pause = _FIRST_PAUSE
    yield pause
    while time.monotonic() < deadline:
        yield pause
        pause = min(2 * pause, _LONGEST_PAUSE)
