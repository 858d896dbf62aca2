"""The uploader: a process beside the trainer that mirrors a tier to the root.

Started as ``python -m ckpt.upload TIER`` by the manager of one rank a node, in a session of its
own, so that it outlives the trainer. It ends when its queue is empty and no trainer uses the
tier, or when a later trainer wants an uploader with its own settings. It may die at any point:
the next one goes on from what is visible at the root.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from .commit import newest_epoch
from .errors import CkptError, ConfigError, DamagedError, Superseded
from .mirror import Mirror
from .recorder import Recorder
from .retain import Keeper
from .session import OPTIONS_VARIABLE, Beat, Session, write_beat
from .storage import Storage, open_storage
from .storage.faultpoints import hit
from .tier import Item, Outcome, Tier

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 0.25
"""Pause between two looks at an empty queue: a listing of two local directories."""
BEAT_SECONDS: Final = 1.0
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 60.0
"""Bounds of the pause after a failure of the root; the store itself repeats requests, too."""
NICE: Final = 5
"""Training comes first where cores are short."""
PATIENCE_SECONDS: Final = 3600.0
"""How long an uploader whose trainer has gone tries without getting anywhere."""


class Uploader:
    """Works through one tier's queue.

    Args:
        tier: the tier; its uploader lock is held by the caller.
        remote: the root.
        session: which trainer's settings these are.
        patience: seconds without progress after which it gives up once no trainer is left.
        recorder: tells the root's timeline what retention deleted there; None: nobody.
    """

    def __init__(
        self,
        tier: Tier,
        remote: Storage,
        session: Session,
        *,
        patience: float = PATIENCE_SECONDS,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._tier = tier
        self._remote = remote
        self._session = session
        self._patience = patience
        self._root = Path(tier.storage.url)
        self._keeper = Keeper(remote, session.retention, session.run)
        self._mirror = Mirror(tier, remote, self._sent)
        self._beat = Beat(pid=os.getpid(), session=session.id, state="starting")
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._swept = False
        self._progress = time.monotonic()

    def run(self) -> bool:
        """Work until there is nothing left to do and no trainer that could bring more.

        Returns:
            Whether all that is to be done here is done; False after a hand-over or when patience
            ran out.
        """
        self._beat = replace(self._beat, moved=time.time())
        write_beat(self._root, self._beat)
        pulse = threading.Thread(target=self._pulse, name="ckpt-pulse", daemon=True)
        pulse.start()
        try:
            return self._work()
        finally:
            self._ended.set()
            pulse.join()

    def _work(self) -> bool:
        pause = FIRST_PAUSE
        while True:
            alive = self._tier.trainer_alive()  # before the queue, to which it may still add
            queue = self._tier.queue()
            if not queue and not alive:
                self._show(state="ended", queue=0, current=None)
                return True
            if self._handed_over() or self._hopeless(alive):
                self._show(state="ended", queue=len(queue), current=None)
                return not queue
            if not queue:
                hit("upload.idle")
                self._show(state="idle", queue=0, current=None)
                time.sleep(POLL_SECONDS)
                continue
            failed, waiting = self.round(queue)
            if failed:
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause = FIRST_PAUSE
            if waiting == len(queue):
                if not alive and all(map(self._elsewhere, queue)):
                    self._show(state="ended", current=None)
                    return True  # its parts are up; the manifests are for another node to write
                time.sleep(FIRST_PAUSE)

    def round(self, queue: list[Item]) -> tuple[bool, int]:
        """One pass over a queue; (whether the root failed, items that wait for other nodes)."""
        failed, waiting = False, 0
        for number, item in enumerate(queue):
            self._show(state="uploading", queue=len(queue) - number, current=item.name)
            try:
                outcome = self._mirror.run(item)
                if outcome is not None:
                    self._settled(item, outcome)
            except (DamagedError, Superseded) as error:
                self._trouble("uploading", error)
                # Unless the item was the culprit and is settled now, something at the root is, or
                # a writer's record: that must not hold up what comes after it.
                failed = failed or item.name not in self._tier.outcomes()
                continue
            except CkptError as error:
                self._trouble("retrying", error)
                return True, waiting
            if outcome is None:
                waiting += 1
                self._show(state="waiting")
        if not waiting and not failed:
            self._show(problem=None)
        return failed, waiting

    def _settled(self, item: Item, outcome: Outcome) -> None:
        self._progress = time.monotonic()
        logger.info("%s: %s", item.name, outcome)
        self._show(mirrored=self._beat.mirrored + 1, superseded=self._mirror.superseded)
        if outcome is not Outcome.mirrored:
            return
        if item.pair is None:
            self._tell(self._keeper.prune_versions())
            return
        if self._elsewhere(item):
            return  # the rule is applied once, by the uploader that made the step exist
        step, epoch = item.pair
        self._keeper.committed(step, epoch, self._mirror.metrics.pop((step, epoch), {}))
        self._tell(self._keeper.prune_steps(epoch))
        if not self._swept and not self._tier.queue() and newest_epoch(self._remote) == epoch:
            self._swept = True
            # Attempts begin with their manager's id: this trainer's are under way perhaps.
            self._keeper.sweep(epoch, self._session.nonce)

    def _tell(self, removed: list[str]) -> None:
        if self._recorder is not None:
            self._recorder.removed(removed)

    def _elsewhere(self, item: Item) -> bool:
        """Whether the uploader of another node makes the step exist at the root."""
        part = None if item.pair is None else self._tier.part(item.path)
        return part is not None and not part.coordinator

    def _trouble(self, state: str, error: CkptError) -> None:
        if str(error) != self._beat.problem:
            logger.warning("%s", error)
        self._show(state=state, problem=str(error), superseded=self._mirror.superseded)

    def _handed_over(self) -> bool:
        try:
            session = Session.load(self._tier.storage)
        except CkptError as error:
            self._trouble(self._beat.state, error)
            return False
        return session is not None and session.id != self._session.id

    def _hopeless(self, alive: bool) -> bool:
        return not alive and time.monotonic() - self._progress > self._patience

    def _sent(self, count: int) -> None:
        self._progress = time.monotonic()
        with self._lock:
            total = self._beat.sent_bytes + count
            self._beat = replace(self._beat, sent_bytes=total, moved=time.time())

    def _show(self, **changes: Any) -> None:
        """Note that the work goes on; a change is written at once, the rest by the pulse."""
        with self._lock:
            news = any(getattr(self._beat, name) != value for name, value in changes.items())
            sent = self._remote.traffic.requests
            self._beat = replace(self._beat, moved=time.time(), requests=sent, **changes)
            if news:
                write_beat(self._root, self._beat)

    def _pulse(self) -> None:
        """Write heartbeats, on a thread: a request to the root may take minutes."""
        while not self._ended.wait(BEAT_SECONDS):
            with self._lock:
                write_beat(self._root, self._beat)


def drain(tier_root: str, remote: Storage) -> tuple[dict[str, Outcome], list[Item], list[str]]:
    """Mirror, by hand, what a trainer that is gone left in its tier.

    Args:
        tier_root: the tier.
        remote: the root it belongs to.

    Returns:
        What became of each item that was settled, the items that wait for parts of other nodes,
        and what went wrong.

    Raises:
        ConfigError: not a tier of that root, or an uploader is at work in it.
        StorageError: the root or the tier failed.
    """
    tier = Tier(tier_root, remote.url)
    lock = tier.hold_uploader()
    if lock is None:
        raise ConfigError(f"an uploader is at work in {tier.storage.url}; wait until it has ended")
    try:
        mirror = Mirror(tier, remote, lambda count: None)
        done: dict[str, Outcome] = {}
        waiting: list[Item] = []
        problems: list[str] = []
        for item in tier.queue():
            try:
                outcome = mirror.run(item)
            except (DamagedError, Superseded) as error:
                problems.append(str(error))
                continue
            if outcome is None:
                waiting.append(item)
            else:
                done[item.name] = outcome
        return done, waiting, problems
    finally:
        lock.release()


def main(arguments: list[str]) -> int:
    """Be the uploader of a tier.

    Args:
        arguments: the tier's path; everything else is in its session and the environment.

    Returns:
        0: the queue is empty, or somebody else works on it; 1: it is not; 2: nothing to do here.
    """
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    logging.raiseExceptions = False  # the log lies in the tier, and that may be full
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m ckpt.upload TIER\n")
        return 2
    os.nice(NICE)
    options: dict[str, Any] | None = json.loads(os.environ.get(OPTIONS_VARIABLE, "null"))
    try:
        session = Session.load(open_storage(arguments[0]))
        if session is None:
            sys.stderr.write(f"{arguments[0]} is not a tier that a trainer has used\n")
            return 2
        remote = open_storage(session.remote, options)
        tier = Tier(arguments[0], remote.url)
        lock = tier.hold_uploader()
        if lock is None:
            return 0
        recorder = Recorder(lambda: open_storage(session.remote, options), "uploader")
        try:
            return 0 if Uploader(tier, remote, session, recorder=recorder).run() else 1
        finally:
            recorder.close()
            remote.close()
            lock.release()
    except CkptError as error:
        logger.error("%s", error)  # noqa: TRY400 - one line: the message says it all
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
