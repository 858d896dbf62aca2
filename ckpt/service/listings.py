"""Pages of steps and versions: names by one listing, manifests only of the page.

A committed step or version never changes, so that what its manifest says is kept for a while; what
a listing shows of the files' presence may be that old. Reading all bytes is a job's part.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Final, Generic, TypeVar

from ckpt.catalog import StepEntry, read_lineage, step_dirs, step_entry
from ckpt.errors import ConfigError
from ckpt.holds import Holds, pinned
from ckpt.layout import parse_step_dir, parse_version_name, step_name
from ckpt.storage import Storage
from ckpt.versions import VersionEntry, find_version, version_entry, version_names
from ckpt.wire import StepList, StepRow, VerifiedRow, VersionList, VersionRow

from .rows import step_row, version_row

KEPT_S: Final = 60.0
"""How old what is shown of a whole step or version may be."""
_MOST: Final = 20_000

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Kept(Generic[K, V]):
    """Values that were read lately, up to a bound."""

    def __init__(self, keep_s: float, clock: Callable[[], float]) -> None:
        self._keep_s, self._clock = keep_s, clock
        self._values: OrderedDict[K, tuple[float, V]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: K) -> V | None:
        """A value that is not too old."""
        with self._lock:
            at, value = self._values.get(key, (None, None))
            return value if at is not None and self._clock() - at < self._keep_s else None

    def put(self, key: K, value: V) -> None:
        """Keep a value."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = (self._clock(), value)
            while len(self._values) > _MOST:
                self._values.popitem(last=False)


class Listings:
    """What lies in one root, page by page. For many threads.

    Args:
        storage: the root.
        verified: when each step or version was last read as a whole, by its bare name.
        keep_s: how old what is shown may be.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        storage: Storage,
        verified: Callable[[], Mapping[str, VerifiedRow]],
        *,
        keep_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._storage, self._verified = storage, verified
        self._steps: _Kept[tuple[int, int], StepRow] = _Kept(keep_s, clock)
        self._versions: _Kept[str, VersionRow] = _Kept(keep_s, clock)

    def steps(self, before: str | None, limit: int) -> StepList:
        """A page of steps, newest first.

        Args:
            before: only steps below the one of that name (``step-00000042.w0003``).
            limit: length of the page.

        Raises:
            ConfigError: ``before`` names no step.
            DamagedError: a writer's record hides which steps count.
            StorageError: the store failed.
        """
        found = step_dirs(self._storage)
        lineage = set(read_lineage(self._storage, found).steps)
        floor = None
        if before is not None:
            floor = parse_step_dir(before)
            if floor is None:
                raise ConfigError(f"before must name a step like {step_name(42, 3)!r}")
        names = [pair for pair in reversed(found) if floor is None or pair < floor]
        kept, verified = pinned(self._storage), self._verified()
        rows = tuple(
            replace(
                self._step(pair, pair in lineage),
                pinned=step_name(*pair) in kept,
                verified=verified.get(step_name(*pair)),
            )
            for pair in names[:limit]
        )
        more = len(names) > limit
        last = None if not more else step_name(*names[limit - 1])
        return StepList(rows, len(found), last)

    def _step(self, pair: tuple[int, int], counts: bool) -> StepRow:
        row = self._steps.get(pair)
        if row is None or (row.state == "committed") is not counts:
            entry: StepEntry = step_entry(self._storage, *pair, counts)
            row = step_row(entry)
            if entry.state in ("committed", "abandoned"):
                self._steps.put(pair, row)
        return row

    def versions(self, run_name: str | None, before: str | None, limit: int) -> VersionList:
        """A page of versions, newest first; by run, where a root has several.

        Args:
            run_name: only versions of that run.
            before: only versions below the one of that name.
            limit: length of the page.

        Raises:
            ConfigError: ``before`` names no version.
            StorageError: the store failed.
        """
        found = list(version_names(self._storage, run_name).items())
        floor = None
        if before is not None:
            floor = parse_version_name(before)
            if floor is None:
                raise ConfigError("before must name a version like 'run7-v00000042'")
        names = [item for item in reversed(found) if floor is None or item[0] < floor]
        holds, verified = Holds(self._storage), self._verified()
        page = [self._version(pair, is_dir) for pair, is_dir in names[:limit]]
        rows = tuple(
            replace(row, held=holds.of(row.name), verified=verified.get(row.name)) for row in page
        )
        last = rows[-1].name if len(names) > limit else None
        return VersionList(rows, len(found), last)

    def _version(self, pair: tuple[str, int], is_dir: bool) -> VersionRow:
        name = f"{pair[0]}-v{pair[1]:08d}"
        row = self._versions.get(name)
        if row is None:
            entry: VersionEntry = (
                version_entry(self._storage, *pair) if is_dir else find_version(self._storage, name)
            )
            row = version_row(entry)
            if entry.state == "committed":
                self._versions.put(name, row)
        return row
