"""Heat maps are made one at a time on a thread of their own, and kept: versions never change."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CkptError, HandoffTimeout, StorageError
from ckpt.service.limits import Busy

from .norms import NormTable, Tick

KEPT: Final = 64
QUEUE: Final = 4
SECONDS: Final = 120.0
"""A heat map that takes longer is given up."""
FAILED_S: Final = 30.0
"""Before what failed is tried again."""

Key = tuple[str, ...]


@dataclass(slots=True)
class _Work:
    share: float = 0.0
    table: NormTable | None = None
    error: CkptError | None = None
    ended: float = 0.0


class Heats:
    """Tables of norms by what they are of. For many threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ckpt-norms")
        self._lock = threading.Lock()
        self._works: OrderedDict[Key, _Work] = OrderedDict()
        self._closed = False

    def ask(self, key: Key, make: Callable[[Tick], NormTable]) -> NormTable | float:
        """The table, or the share of it that is done by now; the first question begins the work.

        Args:
            key: names it for ever.
            make: makes it.

        Raises:
            CkptError: why it cannot be made.
            Busy: too many are waiting to be made.
        """
        with self._lock:
            work = self._works.get(key)
            if work is not None and work.error is not None and self._old(work):
                work = None
            if work is None:
                waiting = sum(one.ended == 0.0 for one in self._works.values())
                if waiting >= QUEUE:
                    raise Busy(f"{waiting} heat maps are being made; try later", 5.0)
                work = self._works[key] = _Work()
                self._pool.submit(self._run, work, make)
            self._works.move_to_end(key)
            for old in [name for name, one in self._works.items() if one.ended][:-KEPT]:
                del self._works[old]
        if work.error is not None:
            raise work.error
        return work.share if work.table is None else work.table

    def close(self) -> None:
        """Make no more."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _old(work: _Work) -> bool:
        return time.monotonic() - work.ended > FAILED_S

    def _run(self, work: _Work, make: Callable[[Tick], NormTable]) -> None:
        began = time.monotonic()

        def tick(share: float) -> None:
            work.share = share
            if self._closed:
                raise StorageError("the service is stopping")
            if time.monotonic() - began > SECONDS:
                raise HandoffTimeout(f"not done after {SECONDS:.0f} s, and given up")

        try:
            work.table = make(tick)
        except CkptError as error:
            work.error = error
        except Exception as error:
            work.error = StorageError(f"an error of the service itself: {type(error).__name__}")
            raise
        finally:
            work.ended = time.monotonic()
