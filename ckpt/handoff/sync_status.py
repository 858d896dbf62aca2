"""What a sidecar knows of itself, and how it says so: health, readiness, Prometheus' text format.

Nothing here decides anything. Times are of the monotonic clock, but for the time from publish to
live, which compares the trainer's clock with this machine's.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from ckpt.about import package_version

from .registry import Version

NOT_ASKED: Final = "not asked yet"

STALL_S: Final = 900.0
"""The loop over the engines counts as stuck after this long: longer than any load may take."""


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One engine as it answered last.

    Attributes:
        up: whether it answered.
        live: the version that is proven there, or None.
        problem: what is wrong, or None.
        proof: on what the last proof rests (see :class:`~ckpt.handoff.proof.Evidence`), or None.
        proved: when that was, in seconds since 1970.
    """

    up: bool = False
    live: str | None = None
    problem: str | None = NOT_ASKED
    proof: str | None = None
    proved: float | None = None


@dataclass(frozen=True, slots=True)
class Switch:
    """What the way of a version took, from the root to live; moments are seconds since 1970.

    Attributes:
        version: its name.
        seen: when its name was seen at the root.
        cached: when it lay in the cache, verified.
        live: when enough replicas had proven it.
        load_s: the engine's own load, of the replica that took longest.
        proof_s: the proof, of the replica that took longest.
    """

    version: str
    seen: float
    cached: float
    live: float
    load_s: float
    proof_s: float


class SyncStatus:
    """Counts and states, safe between threads.

    Args:
        run: what is served.
        holder: in whose name leases are held.
        engines: URLs of the replicas.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        run: str,
        holder: str,
        engines: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._holder, self._clock = run, holder, clock
        self._mutex = threading.Lock()
        self._replicas = dict.fromkeys(engines, ReplicaState())
        self._counts: Counter[str] = Counter()
        self._sums: dict[str, float] = dict.fromkeys(("pull", "load", "proof"), 0.0)
        self._passed_over: dict[str, str] = {}
        self._newest: int | None = None
        self._current: tuple[str, int] | None = None
        self._to_live_s: float | None = None
        self._last_switch: Switch | None = None
        self._store_problem: str | None = NOT_ASKED
        self._beat = clock()
        self._cache: tuple[int, int] = (0, 0)
        self._leases: Mapping[str, float] = {}
        self._threads: dict[str, Callable[[], bool]] = {}

    def watch_thread(self, name: str, alive: Callable[[], bool]) -> None:
        """Count a thread as part of the process's health."""
        with self._mutex:
            self._threads[name] = alive

    def beat(self) -> None:
        """The loop over the engines went round once more."""
        with self._mutex:
            self._beat = self._clock()

    def store_answered(self, newest: int | None) -> None:
        """The root was looked at; the newest number there, if there is any."""
        with self._mutex:
            self._store_problem = None
            self._newest = newest

    def store_failed(self, problem: str) -> None:
        """The root did not answer."""
        with self._mutex:
            self._store_problem = problem
            self._counts["store_failures"] += 1

    def pulled(self, size: int, seconds: float) -> None:
        """A version of ``size`` bytes came into the cache."""
        with self._mutex:
            self._counts["pulls"] += 1
            self._counts["pull_bytes"] += size
            self._sums["pull"] += seconds

    def passed_over(self, why: str, reasons: Mapping[str, str]) -> None:
        """A version was left out: ``why`` is ``damaged``, ``rejected`` or ``pull``."""
        with self._mutex:
            self._counts[f"passed_over/{why}"] += 1
            self._passed_over = dict(reasons)

    def settled(self, reasons: Mapping[str, str]) -> None:
        """What is still left out, after one of them worked."""
        with self._mutex:
            self._passed_over = dict(reasons)

    def timed(self, what: str, seconds: float) -> None:
        """A load or a proof took so long."""
        with self._mutex:
            self._counts[what] += 1
            self._sums[what] += seconds

    def count(self, what: str, by: int = 1) -> None:
        """Something happened: ``hand_failures``, ``lease_failures``, ``errors``."""
        with self._mutex:
            self._counts[what] += by

    def replica(self, url: str, **changes: Any) -> None:
        """What is now known of one replica."""
        with self._mutex:
            self._replicas[url] = replace(self._replicas[url], **changes)

    def replicas(self) -> dict[str, ReplicaState]:
        """All replicas by URL, as they are known now."""
        with self._mutex:
            return dict(self._replicas)

    def summary(self) -> tuple[str | None, int | None, dict[str, str]]:
        """The version that is live, the newest number at the root, and what was passed over."""
        with self._mutex:
            current = None if self._current is None else self._current[0]
            return current, self._newest, dict(self._passed_over)

    def serves(self, name: str) -> None:
        """A version is live, by its name."""
        with self._mutex:
            self._current = (name, int(name.rpartition("-v")[2]))

    def went_live(self, version: Version) -> None:
        """A version is live on the replicas, from now on."""
        with self._mutex:
            if self._current == (version.name, version.number):
                return
            self._current = (version.name, version.number)
            created = datetime.fromisoformat(version.created)
            self._to_live_s = (datetime.now(UTC) - created).total_seconds()

    def switched(self, switch: Switch) -> None:
        """How a version became live."""
        with self._mutex:
            self._last_switch = switch

    def sizes(self, versions: int, size: int, leases: Mapping[str, float], evicted: int) -> None:
        """What the cache holds and deleted so far, and the ages of the leases in seconds."""
        with self._mutex:
            self._cache = (versions, size)
            self._leases = dict(leases)
            self._counts["evictions"] = evicted

    def health(self) -> tuple[bool, dict[str, Any]]:
        """Whether the process works; a store or an engine that is down is no matter of it."""
        with self._mutex:
            dead = [name for name, alive in self._threads.items() if not alive()]
            stuck = self._clock() - self._beat
        document: dict[str, Any] = {"healthy": not dead and stuck < STALL_S}
        if dead:
            document["stopped_threads"] = dead
        if stuck >= STALL_S:
            document["stuck_s"] = round(stuck, 1)
        return document["healthy"], document

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether every replica serves the version that is current, by its own proven answers."""
        with self._mutex:
            current = self._current
            ready = current is not None and all(
                state.up and state.live == current[0] for state in self._replicas.values()
            )
            document = {
                "ready": ready,
                "run": self._run,
                "holder": self._holder,
                "version": None if current is None else current[0],
                "newest": self._newest,
                "store": self._store_problem or "ok",
                "replicas": {
                    url: {"up": state.up, "live": state.live, "problem": state.problem}
                    for url, state in self._replicas.items()
                },
                "passed_over": self._passed_over,
                "last_switch": None if self._last_switch is None else asdict(self._last_switch),
            }
        return ready, document

    def metrics(self) -> str:
        """The state in Prometheus' text format, version 0.0.4."""
        healthy, _ = self.health()
        ready, _ = self.readiness()
        with self._mutex:
            rows = list(self._rows(healthy, ready))
        return "".join(rows)

    def _rows(self, healthy: bool, ready: bool) -> Iterable[str]:
        info = {"run": self._run, "holder": self._holder, "package": package_version()}
        current = None if self._current is None else self._current[1]
        behind = None if self._newest is None else self._newest - (current or 0)
        gauges: list[tuple[str, str, float | None]] = [
            ("healthy", "Whether the process works.", healthy),
            ("ready", "Whether every replica serves the current version.", ready),
            ("store_up", "Whether the root answered last time.", self._store_problem is None),
            ("newest_version", "Number of the newest version at the root.", self._newest),
            ("current_version", "Number of the version that is live.", current),
            ("versions_behind", "How far the newest number is ahead of the live one.", behind),
            ("publish_to_live_seconds", "From publish to live, of the last one.", self._to_live_s),
            ("cache_versions", "Versions in the cache.", self._cache[0]),
            ("cache_bytes", "Bytes in the cache.", self._cache[1]),
            (
                "lease_age_seconds",
                "Since the lease that was renewed longest ago.",
                max(self._leases.values(), default=None),
            ),
        ]
        yield _metric("info", "gauge", "What this is.", [(info, 1)])
        for name, text, value in gauges:
            if value is not None:
                yield _metric(name, "gauge", text, [({}, value)])
        for name, text, key in _COUNTERS:
            yield _metric(name, "counter", text, [({}, self._counts[key])])
        yield _metric(
            "passed_over_total",
            "counter",
            "Versions that were left out, by reason.",
            [
                ({"reason": reason}, self._counts[f"passed_over/{reason}"])
                for reason in ("damaged", "pull", "rejected")
            ],
        )
        for name, text, key in _SUMMARIES:
            count = self._counts["pulls" if key == "pull" else key]
            yield f"# HELP ckpt_sync_{name} {text}\n# TYPE ckpt_sync_{name} summary\n"
            yield f"ckpt_sync_{name}_sum {_number(self._sums[key])}\n"
            yield f"ckpt_sync_{name}_count {count}\n"
        states = self._replicas.items()
        up = [({"engine": url}, state.up) for url, state in states]
        live = [
            ({"engine": url}, state.live is not None and state.live == (self._current or ("",))[0])
            for url, state in states
        ]
        yield _metric("replica_up", "gauge", "Whether the replica answered last time.", up)
        yield _metric("replica_live", "gauge", "Whether it serves the current version.", live)


_COUNTERS: Final = (
    ("store_failures_total", "Looks at the root that failed.", "store_failures"),
    ("pulls_total", "Versions that came into the cache.", "pulls"),
    ("pull_bytes_total", "Their bytes.", "pull_bytes"),
    ("hand_failures_total", "Versions that did not go live on a replica.", "hand_failures"),
    ("lease_failures_total", "Requests about leases that failed.", "lease_failures"),
    ("cache_evictions_total", "Versions that were deleted from the cache.", "evictions"),
    ("errors_total", "Errors that nothing was prepared for; the log has them.", "errors"),
)
_SUMMARIES: Final = (
    ("pull_seconds", "Time to pull a version, verification included.", "pull"),
    ("load_seconds", "Time of an engine's own load.", "load"),
    ("proof_seconds", "Time to prove a load.", "proof"),
)


def _metric(
    name: str, kind: str, text: str, samples: Sequence[tuple[Mapping[str, str], float]]
) -> str:
    lines = [f"# HELP ckpt_sync_{name} {text}", f"# TYPE ckpt_sync_{name} {kind}"]
    for labels, value in samples:
        shown = ",".join(f'{key}="{_escaped(label)}"' for key, label in labels.items())
        lines.append(f"ckpt_sync_{name}{{{shown}}} {_number(value)}".replace("{}", ""))
    return "\n".join(lines) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if float(value).is_integer() else repr(float(value))
