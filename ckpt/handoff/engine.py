"""What the hand-over asks of an inference engine, whichever it is, and how it fails.

An :class:`Engine` is one replica behind its HTTP address. Nothing here knows a wire format;
:mod:`ckpt.handoff.vllm` and :mod:`ckpt.handoff.sglang` do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from ckpt.errors import CkptError

EngineKind: TypeAlias = Literal["vllm", "sglang"]


class EngineError(CkptError, RuntimeError):
    """A replica did not do what it was asked.

    Attributes:
        url: the replica.
        answer: what it answered, shortened, or what kept it from answering.
        remedy: what to do about it.
        status: the HTTP status, or None if there was no answer.
    """

    def __init__(
        self, url: str, what: str, answer: str, remedy: str, *, status: int | None = None
    ) -> None:
        self.url = url
        self.answer = answer
        self.remedy = remedy
        self.status = status
        code = f"HTTP {status}: " if status is not None else ""
        super().__init__(f"{url}: {what}: {code}{answer}; {remedy}")


class EngineUnreachable(EngineError):
    """No answer came in time: the replica is down, starting, stuck or cut off.

    Whether it did what it was asked is not known.
    """


class AdapterRefused(EngineError):
    """The replica will not take this adapter, however often it is asked."""


class ProofError(CkptError, RuntimeError):
    """A replica's own answers do not show that it serves the version.

    Attributes:
        url: the replica.
        version: the version's name.
    """

    def __init__(self, url: str, version: str, reason: str) -> None:
        self.url = url
        self.version = version
        super().__init__(f"{url}: {version} is not live there: {reason}")


@runtime_checkable
class Engine(Protocol):
    """One replica of an inference engine. Every call ends within the engine's own deadline.

    All methods raise :class:`EngineUnreachable` if no answer comes in time, and
    :class:`EngineError` for an answer that is no success or cannot be understood.
    """

    @property
    def url(self) -> str:
        """Its address, without anything secret."""
        ...

    @property
    def kind(self) -> EngineKind:
        """Which engine it is."""
        ...

    def ready(self, timeout_s: float) -> None:
        """Return once it answers requests.

        Raises:
            EngineUnreachable: it does not within ``timeout_s`` seconds.
        """
        ...

    def adapters(self) -> dict[str, str | None]:
        """Names of the adapters it lists, each with its path if the engine tells."""
        ...

    def load(self, name: str, path: str) -> None:
        """Load an adapter from a directory that the replica can read.

        Returning proves nothing yet: see :mod:`ckpt.handoff.proof`.

        Raises:
            AdapterRefused: it will not take it.
        """
        ...

    def unload(self, name: str) -> None:
        """Take an adapter off the list; one that is not on it is no error.

        The directory must stay as it is for as long as a request may still name the adapter.
        """
        ...

    def logprobs(self, token_ids: Sequence[int], adapter: str | None) -> list[float]:
        """Log-probabilities of tokens 1 to n-1, each given the ones before it, in nats.

        Args:
            token_ids: a prompt of at least two tokens.
            adapter: the adapter to answer under, or None for the base model.
        """
        ...

    def incarnation(self) -> str | None:
        """Text that changes when the replica is restarted, or None if it cannot be told."""
        ...

    def close(self) -> None:
        """Let go of the connections; the replica is not affected."""
        ...
