"""What is deleted after a commit, and what never is.

Only steps that a restore could choose count, so a damaged one never pushes a whole one out. The
newest whole step always stays, and names that are not ours are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from .catalog import StepEntry, list_steps, read_writers
from .commit import newest_epoch
from .errors import CkptError
from .layout import (
    ADAPTERS,
    MANIFEST,
    STEPS,
    TRASH_PREFIX,
    parse_step_dir,
    parse_tmp_step_dir,
    step_dir,
    trash_path,
)
from .lineage import committed_lineage
from .storage import Storage
from .types import Retention
from .versions import delete_version, list_versions

logger = logging.getLogger(__name__)

PARTS_PREFIX = ".parts-"
"""Adapter shards of a publish that is under way (in ``adapters/``)."""


def surplus(
    lineage: Sequence[tuple[int, int]], abandoned: Iterable[tuple[int, int]], keep: Retention
) -> list[tuple[int, int]]:
    """The (step, epoch) pairs to delete; pure.

    Args:
        lineage: whole steps that a restore may choose from, newest first.
        abandoned: steps that a later writer left behind. They go only once the lineage itself
            has all the steps that are to be kept, so that a run which has just started over
            does not at once delete what came before it.
        keep: the rule.
    """
    kept = set(lineage[: keep.latest])
    if keep.every is not None:
        kept |= {pair for pair in lineage if pair[0] % keep.every == 0}
    victims = [pair for pair in lineage if pair not in kept]
    if len(lineage) >= keep.latest:
        victims += sorted(abandoned)
    return victims


class Keeper:
    """Applies the retention of one manager, on rank 0's background thread.

    Args:
        storage: the root.
        keep: the rule.
        run_name: whose published versions ``keep.versions`` counts.
    """

    def __init__(self, storage: Storage, keep: Retention, run_name: str) -> None:
        self._storage = storage
        self._keep = keep
        self._run_name = run_name
        self._whole: set[tuple[int, int]] = set()

    def committed(self, step: int, epoch: int) -> None:
        """Note a step of our own, which needs no reading back to be known as whole."""
        self._whole.add((step, epoch))

    def prune_steps(self) -> None:
        """Delete the steps that the rule does not keep.

        What fails is logged, not raised: the commit before it stands.
        """
        try:
            found = self._found()
            lineage = committed_lineage(read_writers(self._storage), found)
            if len(found) <= self._keep.latest:
                return
            whole = self._check(lineage)
            abandoned = [pair for pair in found if pair not in lineage]
            for pair in surplus(whole, abandoned, self._keep):
                self._delete(step_dir(*pair))
                self._whole.discard(pair)
                logger.info("retention removed step %d of writer %d", *pair)
        except CkptError as error:
            logger.warning("retention of steps failed, nothing else is affected: %s", error)

    def prune_versions(self) -> None:
        """Delete all but the newest published versions of the run; logs instead of raising."""
        if self._keep.versions is None:
            return
        try:
            entries = list_versions(self._storage, self._run_name)
            whole = [entry for entry in entries if entry.state == "committed"]
            for entry in whole[: -self._keep.versions]:
                delete_version(self._storage, entry.name)
                logger.info("retention removed version %s", entry.name)
        except CkptError as error:
            logger.warning("retention of versions failed, nothing else is affected: %s", error)

    def sweep(self, epoch: int, nonce: str) -> None:
        """Remove what dead writers left unfinished; called once, after the first commit.

        Args:
            epoch: this writer's epoch; if a newer one began, nothing is touched.
            nonce: begins the attempts of this manager, which may be under way.
        """
        storage = self._storage
        try:
            if newest_epoch(storage) > epoch:
                return
            for entry in storage.list(STEPS):
                unfinished = parse_tmp_step_dir(entry.name)
                foreign = unfinished is not None and not unfinished[1].startswith(nonce)
                if foreign or self._is_trash(entry.name):
                    storage.delete_tree(f"{STEPS}/{entry.name}")
            for entry in storage.list(ADAPTERS):
                parts = entry.name.removeprefix(PARTS_PREFIX)
                if parts != entry.name and not parts.startswith(nonce):
                    storage.delete_tree(f"{ADAPTERS}/{entry.name}")
            if not storage.has_rename:
                self._sweep_attempts(epoch)
        except CkptError as error:
            logger.warning("sweeping unfinished work failed, nothing else is affected: %s", error)

    def _sweep_attempts(self, epoch: int) -> None:
        """Object stores: attempts of older writers that never got their manifest."""
        for step, writer in self._found():
            path = step_dir(step, writer)
            if writer < epoch and not self._storage.exists(f"{path}/{MANIFEST}"):
                self._storage.delete_tree(path)

    def _is_trash(self, name: str) -> bool:
        inner = name.removeprefix(TRASH_PREFIX)
        return inner != name and parse_step_dir(inner) is not None

    def _found(self) -> list[tuple[int, int]]:
        parsed = (parse_step_dir(entry.name) for entry in self._storage.list(STEPS) if entry.is_dir)
        return [pair for pair in parsed if pair is not None]

    def _check(self, lineage: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those steps of the lineage that are whole; each is read once."""
        if not self._whole.issuperset(lineage):
            entries: list[StepEntry] = list_steps(self._storage)
            self._whole |= {
                (entry.step, entry.epoch) for entry in entries if entry.state == "committed"
            }
            for entry in entries:
                if entry.state == "damaged":
                    logger.warning("%s is damaged and not counted: %s", entry.path, entry.problem)
        return [pair for pair in lineage if pair in self._whole]

    def _delete(self, path: str) -> None:
        """Make a directory disappear at once, then delete it."""
        if self._storage.has_rename:
            trash = trash_path(path)
            self._storage.delete_tree(trash)
            self._storage.rename_dir(path, trash)
            self._storage.delete_tree(trash)
        else:
            self._storage.delete(f"{path}/{MANIFEST}")
            self._storage.delete_tree(path)
