"""What a hand-over did, replica by replica."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from ckpt.errors import CkptError

from .engine import EngineKind
from .proof import Evidence

ReplicaState: TypeAlias = Literal["proven", "loaded", "failed", "untried"]
Stage: TypeAlias = Literal["files", "room", "load", "proof"]


class HandoverFailed(CkptError, RuntimeError):
    """A version is not live; the one before it still is."""


@dataclass(frozen=True, slots=True)
class ReplicaReport:
    """How far one replica came with a version.

    Attributes:
        url: the replica.
        kind: which engine it is.
        state: ``proven``: it serves the version; ``loaded``: the version is on its list, and no
            proof was had; ``failed``: it is not; ``untried``: another replica showed that
            something is wrong with the version, so this one was left alone.
        stage: where it failed, or None.
        reason: why, and what to do about it, or None.
        attempts: how often it was tried.
        load_ms: time of the load that succeeded, or None (0 if it was loaded already).
        proof_ms: time of the proof, or None.
        evidence: what the proof rests on, or None.
    """

    url: str
    kind: EngineKind
    state: ReplicaState
    stage: Stage | None = None
    reason: str | None = None
    attempts: int = 0
    load_ms: float | None = None
    proof_ms: float | None = None
    evidence: Evidence | None = None


@dataclass(frozen=True, slots=True)
class HandoverReport:
    """What became of a version on all replicas.

    Attributes:
        version: its name.
        previous: the version that was live before, or None.
        live: whether it is live now.
        replicas: one entry a replica, in the order in which they were given.
        total_ms: from beginning to end.
    """

    version: str
    previous: str | None
    live: bool
    replicas: tuple[ReplicaReport, ...]
    total_ms: float

    @property
    def failures(self) -> tuple[ReplicaReport, ...]:
        """The replicas that do not serve it."""
        return tuple(item for item in self.replicas if item.state != "proven")

    def explain(self) -> str:
        """One line for people: whether it is live, and which replica failed why."""
        proven = len(self.replicas) - len(self.failures)
        head = f"{self.version} is {'live' if self.live else 'not live'}"
        head += f" ({proven} of {len(self.replicas)} replicas, {self.total_ms:.0f} ms)"
        if not self.live and self.previous not in (None, self.version):
            head += f"; {self.previous} still is"
        return f"{head}; {self.reasons()}" if self.failures else head

    def reasons(self) -> str:
        """Which replica failed, and why."""
        return "; ".join(item.reason or f"{item.url}: {item.state}" for item in self.failures)

    def raise_if_failed(self) -> None:
        """Make a failure an error.

        Raises:
            HandoverFailed: the version is not live.
        """
        if not self.live:
            raise HandoverFailed(self.explain())

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """An adapter that was, or could not be, taken off a replica's list.

    Attributes:
        url: the replica.
        version: the adapter's name.
        done: whether it is off the list.
        reason: why it is not: a lease, or what the replica answered.
    """

    url: str
    version: str
    done: bool
    reason: str | None = None
