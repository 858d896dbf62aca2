"""What a save gives back at once: futures for what is still to come."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from .manifest import VersionManifest
from .types import SaveMetrics


@dataclass(slots=True)
class SaveHandle:
    """One save or publish on its way to storage.

    Attributes:
        step: the step number, or None for a publish without one.
        staged: done when the tensors are copied; the optimizer may then change them.
        committed: the step number once the step exists; None at once for a publish alone, and
            for a save that was skipped because both slots were busy.
        published: the version's manifest once it exists; None if none was asked for.
        metrics: what the save cost; fields fill in as it proceeds.
        skipped: whether ``when_busy`` dropped the save; nothing of it was or will be written.

    The futures of a failed save hold its error. The manager raises it as well, so a handle
    may be thrown away.
    """

    step: int | None
    metrics: SaveMetrics
    staged: Future[None] = field(default_factory=Future)
    committed: Future[int | None] = field(default_factory=Future)
    published: Future[VersionManifest | None] = field(default_factory=Future)
    skipped: bool = False

    def wait_staged(self, timeout: float | None = None) -> None:
        """Block until the tensors are copied; a CPU save is staged when ``save()`` returns.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
            CkptError: the save failed before that.
        """
        self.staged.result(timeout)

    def wait(self, timeout: float | None = None) -> None:
        """Block until the step, and the version if one was asked for, exist.

        Raises:
            TimeoutError: not within ``timeout`` seconds.
            CkptError: the save or the publish failed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        self.committed.result(timeout)
        self.published.result(None if deadline is None else max(0.0, deadline - time.monotonic()))

    def resolve(self, *, step: int | None = None, version: VersionManifest | None = None) -> None:
        """Settle every future that is still open with a result."""
        for future, value in (
            (self.staged, None),
            (self.committed, step),
            (self.published, version),
        ):
            if not future.done():
                future.set_result(value)  # type: ignore[arg-type]  # each future gets its own type

    def refuse(self, error: BaseException) -> None:
        """Settle every future that is still open with an error."""
        for future in (self.staged, self.committed, self.published):
            if not future.done():
                future.set_exception(error)
