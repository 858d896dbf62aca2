"""Making a version live on every replica, and keeping it so.

A version goes to one replica first: an adapter that ends an engine, or that an engine computes
wrongly, then harms one of them. Once that one has proven it, the others follow side by side.
Nothing is switched before enough replicas, by default all, have proven the version; until then the
one before it goes on being served, since it has another name and another directory.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

from ckpt.errors import CkptError, ConfigError, DamagedError
from ckpt.holds import Lease
from ckpt.layout import check_name, parse_version_name

from .bring import Bringer
from .engine import Engine, EngineError
from .proof import check_directory
from .registry import Version
from .report import HandoverReport, ReplicaReport, UnloadReport

DEFAULT_SLOTS: Final = 2
DEFAULT_RETRIES: Final = 2
DEFAULT_PAUSE_S: Final = 0.5

log = logging.getLogger(__name__)


class Leases(Protocol):
    """Who uses which version; a :class:`~ckpt.handoff.registry.Registry` is one."""

    def leases(self, v: str) -> list[Lease]:
        """The leases that hold a version now."""
        ...


class Handover:
    """The replicas of one model, and the version that is live on them.

    One thread at a time calls it. It takes no leases itself: whoever fetched a version holds one.

    Args:
        engines: the replicas; closing them is the caller's part.
        holder: name in which the caller holds its leases; they do not keep an old version loaded.
        slots: how many adapters a replica may have on its list at once, whoever loaded them: at
            least 2, the old version and the new one, and no more than vLLM's ``--max-cpu-loras``
            or SGLang's ``--max-loaded-loras``.
        registry: who uses which version. Without it, nobody but the caller does.
        retries: how often a replica that did not answer, or answered that it failed, is tried
            again within one call.
        retry_pause_s: seconds between two tries.
        quorum: how many replicas must prove a version before it is live; None for all of them. The
            others are brought to it by :meth:`restore_missing`; see :attr:`serving`.
        on_report: told what every hand-over did; may not raise.

    Raises:
        ConfigError: no replicas, one of them twice, or a number that cannot work.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        holder: str,
        slots: int = DEFAULT_SLOTS,
        registry: Leases | None = None,
        retries: int = DEFAULT_RETRIES,
        retry_pause_s: float = DEFAULT_PAUSE_S,
        quorum: int | None = None,
        on_report: Callable[[HandoverReport], object] = lambda _report: None,
    ) -> None:
        self._on_report = on_report
        urls = [engine.url for engine in engines]
        if not urls or len(set(urls)) < len(urls):
            msg = f"want at least one replica, and each of them once; got {urls}"
            raise ConfigError(msg)
        required = len(urls) if quorum is None else quorum
        if slots < 2 or retries < 0 or retry_pause_s < 0 or not 1 <= required <= len(urls):
            msg = (
                "want slots >= 2 (the old version serves until the new one is proven), retries and "
                f"retry_pause_s >= 0 and quorum from 1 to {len(urls)}; got slots={slots}, "
                f"retries={retries}, retry_pause_s={retry_pause_s}, quorum={quorum}"
            )
            raise ConfigError(msg)
        self._engines = tuple(engines)
        self._required = required
        self._slots = slots
        self._holder = check_name("holder", holder)
        self._leases = registry
        self._bringer = Bringer(self._make_room, retries, retry_pause_s)
        self._live: tuple[Version, Path] | None = None
        self._pending: str | None = None
        self._runs: set[str] = set()
        self._listed: dict[str, frozenset[str]] = {}
        self._incarnations: dict[str, str | None] = {}
        # Which process of each replica has proven the live version.
        self._proven: dict[str, str | None] = {}

    @property
    def current(self) -> Version | None:
        """The version that is live, or None before the first one is."""
        return None if self._live is None else self._live[0]

    @property
    def serving(self) -> tuple[str, ...]:
        """Addresses of the replicas that have proven the live version, as far as is known."""
        return tuple(engine.url for engine in self._engines if engine.url in self._proven)

    @property
    def in_use(self) -> frozenset[str]:
        """Names whose directories a replica may still read, as its list was seen last."""
        names = frozenset().union(*self._listed.values())
        known = {self._pending, None if self._live is None else self._live[0].name}
        return names | {name for name in known if name is not None}

    def make_live(self, version: Version, local_dir: str | Path) -> HandoverReport:
        """Load a version on every replica, prove it, and switch to it.

        Whatever fails, the version that was live stays so. Replicas that have proven the new one
        keep it loaded, so that trying again is cheap; where the proof failed, it is taken off.

        Args:
            version: what to make live; an older one than the current will do, too.
            local_dir: its files, in a directory called by its name that the replicas see at the
                same path, and that stays as it is while the version is :attr:`in_use`.

        Returns:
            What happened on each replica; ``live`` says whether it is live now.
        """
        began = time.monotonic()
        directory = Path(local_dir).resolve()
        previous = self.current
        self._runs.add(version.run)
        self._pending = version.name
        try:
            check_directory(version, directory, digest=version.probe is None)
        except DamagedError as error:
            replicas = [self._left_alone(engine) for engine in self._engines]
            replicas[0] = ReplicaReport(
                replicas[0].url, replicas[0].kind, "failed", "files", str(error)
            )
        else:
            replicas = self._bring_everywhere(version, directory)
        proven = self._proven_of(replicas)
        live = len(proven) >= self._required
        if live:
            self._live, self._pending, self._proven = (version, directory), None, proven
        report = HandoverReport(
            version.name,
            None if previous is None else previous.name,
            live,
            tuple(replicas),
            (time.monotonic() - began) * 1e3,
        )
        log.log(logging.INFO if live else logging.WARNING, "%s", report.explain())
        self._on_report(report)
        return report

    def restore_missing(self) -> HandoverReport | None:
        """Bring replicas that do not serve the live version back to it.

        A replica that was restarted has lost its adapters; one that was away at the switch never
        had the version.

        Returns:
            What happened on the replicas that needed it; None if none did.
        """
        if self._live is None:
            return None
        began = time.monotonic()
        version, directory = self._live
        with ThreadPoolExecutor(len(self._engines), "ckpt-handover") as pool:
            astray = list(pool.map(self._astray, self._engines))
            lost = [engine for engine, gone in zip(self._engines, astray, strict=True) if gone]
            if not lost:
                return None
            for engine in lost:
                self._proven.pop(engine.url, None)
            replicas = list(pool.map(lambda one: self._bring(one, version, directory), lost))
        self._proven |= self._proven_of(replicas)
        report = HandoverReport(
            version.name,
            version.name,
            len(self._proven) >= self._required,
            tuple(replicas),
            (time.monotonic() - began) * 1e3,
        )
        if report.failures:
            log.warning("not brought back to %s: %s", version.name, report.reasons())
        else:
            log.info("brought back to %s: %s", version.name, ", ".join(one.url for one in lost))
        self._on_report(report)
        return report

    def unload_unused(self) -> tuple[UnloadReport, ...]:
        """Take versions that nobody uses off the replicas' lists.

        That are the versions of the runs handed over here, also those that an earlier process
        loaded, except the live one, one that is on its way, and those that others hold a lease of.

        Returns:
            What was, and what could not be, taken off.
        """
        if self._live is None:
            return ()
        reports: list[UnloadReport] = []
        keep = {self._live[0].name, self._pending}
        for engine in self._engines:
            try:
                names = self._ours(self._list(engine))
            except EngineError as error:
                log.warning("cannot look for old versions: %s", error)
                continue
            reports += [self._unload(engine, name) for name in names if name not in keep]
        return tuple(reports)

    def _bring_everywhere(self, version: Version, directory: Path) -> list[ReplicaReport]:
        """One after the other until one has proven it, then the rest side by side.

        Those that serve the live version come first: one that is down would only cost its deadline.
        """
        reports = self._bring_in_turn(
            sorted(self._engines, key=lambda engine: engine.url not in self._proven),
            version,
            directory,
        )
        by_url = {report.url: report for report in reports}
        return [by_url[engine.url] for engine in self._engines]

    def _bring_in_turn(
        self, engines: Sequence[Engine], version: Version, directory: Path
    ) -> list[ReplicaReport]:
        reports: list[ReplicaReport] = []
        waiting = list(engines)
        while waiting:
            report = self._bring(waiting.pop(0), version, directory)
            reports.append(report)
            if report.state == "proven":
                break
            if self._bringer.is_to_blame(version.name):
                return reports + [self._left_alone(engine) for engine in waiting]
        if waiting:
            with ThreadPoolExecutor(len(waiting), "ckpt-handover") as pool:
                reports += pool.map(lambda one: self._bring(one, version, directory), waiting)
        return reports

    def _bring(self, engine: Engine, version: Version, directory: Path) -> ReplicaReport:
        report, incarnation = self._bringer.bring(engine, version, directory)
        self._incarnations[engine.url] = incarnation
        if report.state in ("proven", "loaded"):
            self._listed[engine.url] = self._listed.get(engine.url, frozenset()) | {version.name}
        return report

    def _proven_of(self, replicas: Sequence[ReplicaReport]) -> dict[str, str | None]:
        urls = [item.url for item in replicas if item.state == "proven"]
        return {url: self._incarnations.get(url) for url in urls}

    def _left_alone(self, engine: Engine) -> ReplicaReport:
        reason = f"{engine.url}: not tried, for the version itself seems to be at fault"
        return ReplicaReport(engine.url, engine.kind, "untried", reason=reason)

    def _astray(self, engine: Engine) -> bool:
        """Whether a replica has to be brought to the live version."""
        if self._live is None or engine.url not in self._proven:
            return True
        try:
            known = self._proven[engine.url]
            return self._live[0].name not in self._list(engine) or engine.incarnation() != known
        except EngineError:
            return True

    def _list(self, engine: Engine) -> dict[str, str | None]:
        listed = engine.adapters()
        self._listed[engine.url] = frozenset(listed)
        return listed

    def _ours(self, names: dict[str, str | None]) -> list[str]:
        """Versions of our runs, oldest first."""
        pairs = sorted(
            pair for pair in map(parse_version_name, names) if pair and pair[0] in self._runs
        )
        return [f"{run}-v{number:08d}" for run, number in pairs]

    def _make_room(self, engine: Engine, name: str) -> str | None:
        """Free a slot for a version if there is none; why there is none, or None.

        Raises:
            EngineError: the replica failed.
        """
        listed = self._list(engine)
        if name in listed or len(listed) < self._slots:
            return None
        reasons: list[str] = []
        excess = len(listed) - self._slots + 1
        for old in self._ours(listed):
            if self._live is not None and old == self._live[0].name:
                continue
            report = self._unload(engine, old)
            excess -= report.done
            if not excess:
                return None
            if report.reason is not None:
                reasons.append(report.reason)
        others = sorted(set(listed) - set(self._ours(listed)))
        held = "; ".join(reasons + ([f"loaded by others: {', '.join(others)}"] if others else []))
        return (
            f"{engine.url}: all {self._slots} slots are taken, {held or 'by the live version'}; "
            "release the leases, or give more slots to the engine and to the hand-over"
        )

    def _unload(self, engine: Engine, name: str) -> UnloadReport:
        reason = self._held_by(name)
        if reason is None:
            try:
                engine.unload(name)
            except EngineError as error:
                reason = str(error)
            else:
                self._listed[engine.url] = self._listed.get(engine.url, frozenset()) - {name}
                return UnloadReport(engine.url, name, done=True)
        return UnloadReport(engine.url, name, done=False, reason=reason)

    def _held_by(self, name: str) -> str | None:
        """Why a version may not be unloaded, or None."""
        if self._leases is None:
            return None
        try:
            holders = {lease.holder for lease in self._leases.leases(name)} - {self._holder}
        except CkptError as error:
            return f"whether {name} is in use cannot be told: {error}"
        return f"{name} is in use by {', '.join(sorted(holders))}" if holders else None
