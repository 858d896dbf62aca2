"""The sidecar beside inference engines: what is published at a root is served, proven, by them.

Three threads: one watches the root and fills the cache (:mod:`ckpt.handoff.sync_watch`), one renews
leases, and the caller's own drives the engines. None of them waits for what another one waits for:
engines are looked after while the store is down, and leases are renewed during a long load.

Nothing is kept that could disagree with the world. What is served is what the engines list and
prove, what is cached is what lies in the cache and verifies, what is newest is what the root shows.
A sidecar that was killed finds all of it again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import CkptError, ConfigError, StorageError
from ckpt.holds import MAX_TTL_S, Lease
from ckpt.layout import check_name, check_run_name, parse_version_name

from .backoff import Backoff, Setbacks
from .cache import VersionCache
from .engine import Engine, EngineError
from .handover import DEFAULT_SLOTS, Handover
from .lease_keeper import LeaseKeeper
from .registry import LOCAL_POLL_S, REMOTE_POLL_S, Registry, Version
from .report import HandoverReport
from .sync_status import NOT_ASKED, Switch, SyncStatus
from .sync_watch import Offer, Watcher

STOP_SECONDS: Final = 10.0
"""How long a stop waits for a request to the store that is under way."""
FIRST_REST_S: Final = 5.0
LONGEST_REST_S: Final = 600.0
"""A version that was damaged, or that an engine refused, is tried again after so long."""
LONGEST_RESTORE_S: Final = 60.0
"""A replica that cannot be brought back is tried at least this often; at once when it changes."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncConfig:
    """How a sidecar works.

    Attributes:
        run: first part of the versions' names.
        holder: in whose name leases are held: unique to the sidecar, and the same after a restart.
        poll_s: seconds between two looks at the root, each of which is one listing; None for what
            suits the store.
        check_s: seconds between two looks at the engines.
        lease_ttl_s: for how long a lease lasts that is not renewed.
        linger_s: seconds for which a version stays loaded after its successor went live, if no slot
            is needed.
        slots: adapters that an engine may have loaded at once.
        quorum: replicas that must prove a version before it is live; None for all.
    """

    run: str
    holder: str
    poll_s: float | None = None
    check_s: float = 2.0
    lease_ttl_s: float = 600.0
    linger_s: float = 30.0
    slots: int = DEFAULT_SLOTS
    quorum: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the field.
        """
        check_run_name(self.run)
        check_name("lease holder", self.holder)
        for name, low, high in (
            ("poll_s", 0.01, 3600.0),
            ("check_s", 0.01, 3600.0),
            ("lease_ttl_s", 3.0, MAX_TTL_S),
            ("linger_s", 0.0, 24 * 3600.0),
        ):
            value: float | None = getattr(self, name)
            if value is not None and not low <= value <= high:
                msg = f"{name} must be from {low:g} to {high:g} seconds, got {value!r}"
                raise ConfigError(msg)


class _Leases:
    """Who uses a version, unless the store is known not to answer: an engine is not to wait."""

    def __init__(self, registry: Registry, watcher: Watcher) -> None:
        self._registry, self._watcher = registry, watcher

    def leases(self, v: str) -> list[Lease]:
        """As :meth:`Registry.leases`.

        Raises:
            StorageError: also if the watcher's last look failed.
        """
        if not self._watcher.store_up:
            msg = f"{self._registry.url} does not answer"
            raise StorageError(msg)
        return self._registry.leases(v)


class Sidecar:
    """Keeps engines at the newest good version of one run.

    Args:
        registry: the root.
        engines: the replicas, all beside this cache; closing them is the caller's part.
        cache: where versions lie for the engines, at the same path for them.
        config: how.
    """

    def __init__(
        self,
        registry: Registry,
        engines: Sequence[Engine],
        cache: VersionCache,
        config: SyncConfig,
    ) -> None:
        self.status = SyncStatus(config.run, config.holder, [engine.url for engine in engines])
        self._config, self._engines, self._cache = config, tuple(engines), cache
        self._registry = registry
        local = registry.storage.local_path("") is not None
        self._wake = threading.Event()
        self._setbacks = Setbacks(FIRST_REST_S, LONGEST_REST_S)
        self._leases = LeaseKeeper(
            registry,
            config.holder,
            config.lease_ttl_s,
            on_failure=lambda: self.status.count("lease_failures"),
        )
        self._watcher = Watcher(
            registry,
            config.run,
            cache,
            self._leases,
            self._setbacks,
            self.status,
            poll_s=config.poll_s or (LOCAL_POLL_S if local else REMOTE_POLL_S),
            on_offer=self._wake.set,
        )
        self._handover = Handover(
            engines,
            holder=config.holder,
            slots=config.slots,
            registry=_Leases(registry, self._watcher),
            quorum=config.quorum,
        )
        self._listed: dict[str, frozenset[str]] = {}
        self._backoff = Backoff(max(0.5, config.check_s), 30.0)
        self._not_before = 0.0
        self._restoring = Backoff(max(0.5, config.check_s), LONGEST_RESTORE_S)
        self._restore_at = 0.0
        self._switched = 0.0
        self._tidied = 0.0

    def run(self, stop: threading.Event) -> bool:
        """Work until ``stop`` is set; whether everything had ended by then, within a deadline.

        What engines have loaded stays loaded, and its leases run out by themselves: they go on
        serving it, and the next sidecar renews them.
        """
        self.status.watch_thread("watch", lambda: self._watcher.alive)
        self.status.watch_thread("leases", lambda: self._leases.alive)
        self._leases.start()
        self._watcher.start()
        while not stop.is_set():
            self._wake.clear()
            try:
                self.step()
            except Exception:  # an engine must not lose its sidecar to one surprise
                self.status.count("errors")
                log.exception("a round failed in a way nothing was prepared for; trying again")
            self._rest(stop)
        self._watcher.stop()
        self._leases.stop()
        return self._watcher.join(STOP_SECONDS)

    def step(self) -> None:
        """One round over the engines."""
        self.status.beat()
        self._look()
        offer = self._watcher.offer()
        current = self._handover.current
        newer = offer is not None and (current is None or offer.version.number > current.number)
        if offer is not None and newer and time.monotonic() >= self._not_before:
            self._protect(offer)
            self._hand_over(offer)
        elif current is not None and time.monotonic() >= self._restore_at:
            self._restore(current)
        self._tidy()
        self._protect(offer)
        self._tell()

    def _rest(self, stop: threading.Event) -> None:
        """Until the next round: a new offer shortens it, a stop ends it."""
        deadline = time.monotonic() + self._config.check_s
        while not stop.is_set() and not self._wake.is_set():
            left = deadline - time.monotonic()
            if left <= 0:
                return
            self._wake.wait(min(left, 0.2))

    def _look(self) -> None:
        """Ask every engine what it has loaded; one that does not answer keeps its last list."""
        current = self._handover.current
        with ThreadPoolExecutor(len(self._engines), "ckpt-look") as pool:
            for engine, answer in zip(
                self._engines, pool.map(_adapters, self._engines), strict=True
            ):
                before = self.status.replicas()[engine.url]
                if isinstance(answer, EngineError):
                    problem = " ".join(str(answer).split())
                    self.status.replica(engine.url, up=False, problem=problem)
                    if before.up or before.problem == NOT_ASKED:
                        log.warning("an engine is away, asking on: %s", problem)
                    continue
                had = self._listed.get(engine.url, frozenset())
                self._listed[engine.url] = frozenset(answer)
                if not before.up:
                    self.status.replica(engine.url, up=True, problem=None)
                    log.info("%s answers; adapters on its list: %d", engine.url, len(answer))
                    # What failed because it was away need not wait.
                    self._not_before = self._restore_at = 0.0
                elif current is not None and current.name in had - self._listed[engine.url]:
                    self._restore_at = 0.0  # it was restarted between two looks

    def _hand_over(self, offer: Offer) -> None:
        report = self._handover.make_live(offer.version, offer.directory)
        self._note(report)
        name = offer.version.name
        if report.live:
            self._tell_switch(offer, report)
            self._backoff.succeeded()
            self._setbacks.forget(name)
            self.status.settled(self._setbacks.reasons())
            self.status.went_live(offer.version)
            self._watcher.serving(offer.version.number)
            self._switched = time.monotonic()
            return
        self.status.count("hand_failures")
        self._not_before = time.monotonic() + self._backoff.failed()
        self._look()
        up = {url for url, state in self.status.replicas().items() if state.up}
        at_fault = [
            item
            for item in report.failures
            if item.stage in {"files", "load", "proof"} and item.url in up
        ]
        if not at_fault:
            return  # an engine is away, or has no slot: that says nothing of the version
        if any(item.stage == "files" for item in at_fault):
            self._cache.doubt(name)
        self._setbacks.add(name, at_fault[0].reason or at_fault[0].state)
        self._watcher.withdraw(name)
        self.status.passed_over("rejected", self._setbacks.reasons())
        self._not_before = 0.0  # the one that is offered in its place need not wait

    def _tell_switch(self, offer: Offer, report: HandoverReport) -> None:
        longest = [
            max((time_ms or 0.0 for time_ms in times), default=0.0) / 1e3
            for times in (
                [item.load_ms for item in report.replicas],
                [item.proof_ms for item in report.replicas],
            )
        ]
        name, now = offer.version.name, time.time()
        self.status.switched(Switch(name, offer.seen, offer.cached, now, *longest))

    def _restore(self, current: Version) -> None:
        """Bring engines back that do not serve the live version; ever more seldom if they fail."""
        if not self._whole(current):
            return
        report = self._handover.restore_missing()
        self._note(report)
        if report is None or not report.failures:
            self._restoring.succeeded()
        else:
            self._restore_at = time.monotonic() + self._restoring.failed()

    def _whole(self, current: Version) -> bool:
        """Whether the live version may be loaded again, where an engine has lost it.

        Its copy was verified when it went live, which may be long ago.
        """
        if all(current.name in names for names in self._listed.values()):
            return True
        self._cache.doubt(current.name)
        try:
            self._cache.get(self._registry, current)
        except CkptError as error:
            self.status.count("hand_failures")
            log.warning("%s cannot be loaded again for now: %s", current.name, error)
            return False
        return True

    def _note(self, report: HandoverReport | None) -> None:
        """Tell the status what a hand-over did on each replica."""
        for item in () if report is None else report.replicas:
            problem = None if item.state == "proven" else item.reason or item.state
            self.status.replica(item.url, problem=problem)
            if problem is None and report is not None:
                self._listed[item.url] = self._listed.get(item.url, frozenset()) | {report.version}
            if item.load_ms:
                self.status.timed("load", item.load_ms / 1e3)
            if item.proof_ms is not None:
                self.status.timed("proof", item.proof_ms / 1e3)
            if item.evidence is not None:
                self.status.replica(item.url, proof=item.evidence.by, proved=time.time())

    def _tidy(self) -> None:
        """Unload what nobody uses, now and then, some time after the last switch."""
        now = time.monotonic()
        if now - self._switched < self._config.linger_s or now - self._tidied < 5.0:
            return
        self._tidied = now
        for item in self._handover.unload_unused():
            if item.done:
                self._listed[item.url] = self._listed.get(item.url, frozenset()) - {item.version}
                log.info("%s: unloaded %s", item.url, item.version)

    def _protect(self, offer: Offer | None) -> None:
        """What may not be deleted: here in the cache, and at the root by leases."""
        names = set(self._handover.in_use).union(*self._listed.values())
        if offer is not None:
            names.add(offer.version.name)
        ours = {
            name for name in names if (parse_version_name(name) or ("",))[0] == self._config.run
        }
        self._leases.keep(ours)
        if len(self._listed) == len(self._engines):
            # Before each engine has answered once, nobody knows what it may still read.
            self._cache.use(ours)

    def _tell(self) -> None:
        current, serving = self._handover.current, self._handover.serving
        for engine in self._engines:
            name = None if current is None or engine.url not in serving else current.name
            listed = self._listed.get(engine.url, frozenset())
            self.status.replica(engine.url, live=name if name in listed else None)
        entries = self._cache.entries()
        size = sum(entry.bytes for entry in entries)
        self.status.sizes(len(entries), size, self._leases.ages(), self._cache.evicted)


def _adapters(engine: Engine) -> dict[str, str | None] | EngineError:
    try:
        return engine.adapters()
    except EngineError as error:
        return error


def default_holder(host: str, run: str, cache: Path) -> str:
    """A holder's name that a restart on the same host finds again, and nobody else has.

    The cache stands in it as a digest: it is one process's alone, where a host may have several
    sidecars of a run, and two that shared a name would give each other's leases back.

    Raises:
        ConfigError: no such run's name.
    """
    check_run_name(run)
    safe = "".join(char if char.isascii() and char.isalnum() else "-" for char in host).strip("-")
    place = "\n".join((host, run, os.path.realpath(cache.expanduser())))
    mark = hashlib.sha256(place.encode()).hexdigest()[:8]
    return check_name("lease holder", f"sync-{safe[:40]}-{run[:40]}-{mark}")
