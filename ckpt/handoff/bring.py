"""One replica brought to one version: room, load, proof, and what is learned when it fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ckpt.errors import CkptError

from .engine import AdapterRefused, Engine, EngineError, EngineUnreachable, ProofError
from .proof import prove
from .registry import Version
from .report import ReplicaReport, Stage

log = logging.getLogger(__name__)

_GONE_CHECK_S = 1.0


class Bringer:
    """Loads and proves versions on single replicas; several threads may ask at once.

    It remembers two things, so that no name is ever loaded twice in doubt: versions under whose
    first use a replica went away, and replicas that answered wrongly under a version's name.

    Args:
        make_room: frees a slot on a replica for a name; gives the reason if it cannot.
        retries: how often a replica is tried again.
        pause_s: seconds between two tries.
    """

    def __init__(
        self, make_room: Callable[[Engine, str], str | None], retries: int, pause_s: float
    ) -> None:
        self._make_room = make_room
        self._retries = retries
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._ended: dict[str, tuple[str, str | None]] = {}
        self._wrong: dict[tuple[str, str], str | None] = {}
        self._blamed: set[str] = set()

    def is_to_blame(self, name: str) -> bool:
        """Whether the last failure of a version was its own fault rather than the replica's."""
        return name in self._blamed

    def bring(
        self, engine: Engine, version: Version, directory: Path
    ) -> tuple[ReplicaReport, str | None]:
        """Make a replica serve a version.

        Returns:
            What happened, and the replica's incarnation if it could be told.
        """
        name = version.name
        self._blamed.discard(name)
        report = ReplicaReport(engine.url, engine.kind, "failed")
        incarnation: str | None = None
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(self._pause_s)
            report = replace(report, attempts=attempt + 1)
            stage: Stage = "load"
            try:
                incarnation = engine.incarnation()
                problem = self._doubt(engine, name, incarnation)
                if problem is not None:
                    return replace(report, stage="proof", reason=problem), incarnation
                stage = "room"
                problem = self._make_room(engine, name)
                if problem is not None:
                    return replace(report, stage=stage, reason=problem), incarnation
                stage = "load"
                report = replace(report, load_ms=self._load(engine, name, str(directory)))
                stage = "proof"
                began = time.monotonic()
                evidence = prove(engine, version, directory)
                proof_ms = (time.monotonic() - began) * 1e3
                proven = replace(
                    report,
                    state="proven",
                    stage=None,
                    reason=None,
                    proof_ms=proof_ms,
                    evidence=evidence,
                )
                return proven, incarnation
            except ProofError as error:
                self._withdraw(engine, name, incarnation)
                return replace(report, stage=stage, reason=str(error)), incarnation
            except AdapterRefused as error:
                self._blamed.add(name)
                return replace(report, stage=stage, reason=str(error)), incarnation
            except EngineError as error:
                report = replace(report, state="failed", stage=stage, reason=str(error))
                if stage != "proof":
                    continue
                if isinstance(error, EngineUnreachable) and self._went_away(engine, incarnation):
                    with self._lock:
                        self._ended[name] = (engine.url, incarnation)
                    self._blamed.add(name)
                    return replace(report, reason=f"{error}; {_ENDED}"), incarnation
                report = replace(report, state="loaded")
            except CkptError as error:  # the version's files
                self._blamed.add(name)
                return replace(report, stage="files", reason=str(error)), incarnation
        return report, incarnation

    def _load(self, engine: Engine, name: str, path: str) -> float:
        """Load, unless it is loaded; time in milliseconds.

        After a try with an unknown end the list tells what became of it.
        """
        listed = engine.adapters()
        if name in listed:
            if listed[name] not in (None, path):
                answer = f"the name stands for {listed[name]} there"
                remedy = f"unload it, or publish the next version; wanted was {path}"
                raise AdapterRefused(engine.url, f"load {name}", answer, remedy)
            return 0.0
        began = time.monotonic()
        engine.load(name, path)
        return (time.monotonic() - began) * 1e3

    def _doubt(self, engine: Engine, name: str, incarnation: str | None) -> str | None:
        """Why a version may not be loaded on a replica again, or None."""
        with self._lock:
            if name in self._ended:
                url, before = self._ended[name]
                if url != engine.url:
                    self._blamed.add(name)
                    return f"{engine.url}: not loaded, for {url} went away when it first used it"
                if before is None or before != incarnation:
                    self._blamed.add(name)
                    return f"{engine.url}: not loaded again: {_ENDED}"
                del self._ended[name]  # the very process is still there: it was only cut off
            key = (engine.url, name)
            if key in self._wrong:
                if self._wrong[key] in (None, incarnation):
                    return (
                        f"{engine.url}: {name} was loaded there and proved wrong; an engine may "
                        "keep what it computed under a name: restart it, or publish anew"
                    )
                del self._wrong[key]
        return None

    def _went_away(self, engine: Engine, incarnation: str | None) -> bool:
        """Whether a replica that did not answer is gone or has been started again."""
        try:
            engine.ready(_GONE_CHECK_S)
            return incarnation is None or engine.incarnation() != incarnation
        except EngineError:
            return True

    def _withdraw(self, engine: Engine, name: str, incarnation: str | None) -> None:
        """Take a version whose proof failed off the replica."""
        with self._lock:
            self._wrong[(engine.url, name)] = incarnation
        try:
            engine.unload(name)
        except EngineError as error:
            log.warning("%s stays on the list, unused: %s", name, error)


_ENDED = (
    "the replica went away when it first used the version, which may have ended it: run "
    "`ckpt lint` on the version, see the replica's log, and publish the next one"
)
