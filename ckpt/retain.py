"""What is deleted after a commit, and what never is.

Only steps that a restore could choose count, so a damaged one never pushes a whole one out. The
newest whole step always stays, and names that are not ours are left alone.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .catalog import StepEntry, list_steps, read_lineage
from .commit import newest_epoch
from .errors import CkptError
from .holds import pinned, remove_unless_held
from .layout import (
    ADAPTERS,
    MANIFEST,
    STEPS,
    TRASH_PREFIX,
    parse_step_dir,
    parse_tmp_step_dir,
    step_dir,
    step_name,
)
from .storage import Storage
from .types import Retention
from .version_retain import apply_fate, put_back_trash, review_versions

logger = logging.getLogger(__name__)

PARTS_PREFIX = ".parts-"
"""Adapter shards of a publish that is under way (in ``adapters/``)."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What a rule decides about one step, and why (for people)."""

    step: int
    epoch: int
    keep: bool
    reason: str


def judge(
    lineage: Sequence[tuple[int, int]],
    abandoned: Iterable[tuple[int, int]],
    keep: Retention,
    *,
    scores: Mapping[tuple[int, int], Mapping[str, float]] | None = None,
    pinned: Collection[str] = (),
) -> list[Fate]:
    """Decide about every step; pure.

    Args:
        lineage: whole steps that a restore may choose from, newest first.
        abandoned: steps that a later writer left behind. They go only once the lineage itself
            has all the steps that are to be kept, so that a run which has just started over
            does not at once delete what came before it.
        keep: the rule.
        scores: the metrics of the steps; one without ``keep.metric`` is not among the best.
        pinned: bare names of what is pinned.

    Returns:
        The lineage in its order, then the abandoned steps by number and writer.
    """
    best = _best(lineage, keep, scores or {})
    fates = []
    for place, (step, epoch) in enumerate(lineage):
        reasons = []
        if place == 0:
            reasons.append("newest valid")
        elif place < keep.latest:
            reasons.append(f"among the latest {keep.latest}")
        if keep.every is not None and step % keep.every == 0:
            reasons.append(f"a multiple of {keep.every}")
        if (step, epoch) in best:
            reasons.append(f"among the best {keep.best} by {keep.metric} ({best[step, epoch]:.6g})")
        if step_name(step, epoch) in pinned:
            reasons.append("pinned")
        fates.append(Fate(step, epoch, bool(reasons), ", ".join(reasons) or "no rule keeps it"))
    early = len(lineage) < keep.latest
    for step, epoch in sorted(abandoned):
        reason = "abandoned: a later writer resumed from before it"
        held = step_name(step, epoch) in pinned
        if held:
            reason += "; pinned"
        elif early:
            reason += f"; stays until there are {keep.latest} valid steps"
        fates.append(Fate(step, epoch, held or early, reason))
    return fates


def _best(
    lineage: Sequence[tuple[int, int]],
    keep: Retention,
    scores: Mapping[tuple[int, int], Mapping[str, float]],
) -> dict[tuple[int, int], float]:
    """The best steps with their values; of equal ones the newer."""
    if keep.best is None or keep.metric is None:
        return {}
    known = [(pair, scores.get(pair, {}).get(keep.metric)) for pair in lineage]
    rated = [(pair, value) for pair, value in known if value is not None]
    sign = -1.0 if keep.mode == "max" else 1.0
    return dict(sorted(rated, key=lambda item: sign * item[1])[: keep.best])


def surplus(
    lineage: Sequence[tuple[int, int]], abandoned: Iterable[tuple[int, int]], keep: Retention
) -> list[tuple[int, int]]:
    """The (step, epoch) pairs that :func:`judge` gives up."""
    return [(f.step, f.epoch) for f in judge(lineage, abandoned, keep) if not f.keep]


def review(storage: Storage, keep: Retention) -> list[tuple[StepEntry, Fate]]:
    """What a rule would do with the steps of a root as they are now; deletes nothing.

    Returns:
        Every step directory with its fate, by step and writer.

    Raises:
        DamagedError: a writer's record is damaged.
        StorageError: the store failed.
    """
    entries = {(entry.step, entry.epoch): entry for entry in list_steps(storage)}
    lineage, hidden = read_lineage(storage, entries)
    whole = [pair for pair in lineage if entries[pair].state == "committed"]
    scores = {
        pair: entry.manifest.metrics
        for pair, entry in entries.items()
        if entry.manifest is not None
    }
    abandoned = set(entries).difference(lineage, hidden)
    fates = judge(whole, abandoned, keep, scores=scores, pinned=pinned(storage))
    fates += [
        Fate(*pair, keep=True, reason=f"{entries[pair].state}: not counted, left alone")
        for pair in lineage
        if pair not in whole
    ]
    fates += [Fate(*pair, keep=True, reason="behind a lost writer's record") for pair in hidden]
    fates.sort(key=lambda fate: (fate.step, fate.epoch))
    return [(entries[fate.step, fate.epoch], fate) for fate in fates]


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
        self._whole: dict[tuple[int, int], Mapping[str, float]] = {}
        self._whole_versions: set[str] = set()

    def committed(self, step: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Note a step of our own, which needs no reading back to be known as whole."""
        self._whole[step, epoch] = metrics

    def prune_steps(self, epoch: int) -> list[str]:
        """Delete the steps that the rule does not keep.

        What fails is logged, not raised: the commit before it stands.

        Args:
            epoch: this writer's epoch; if a newer one began, its rule decides, not this one.

        Returns:
            Bare names of those that were deleted.
        """
        storage = self._storage
        gone: list[str] = []
        try:
            found = self._found()
            if newest_epoch(storage) > epoch:
                return gone
            lineage, hidden = read_lineage(storage, found)
            if len(found) <= self._keep.latest:
                return gone
            whole = self._check(lineage)
            abandoned = set(found).difference(lineage, hidden)
            fates = judge(whole, abandoned, self._keep, scores=self._whole)
            for fate in fates:
                name = step_name(fate.step, fate.epoch)
                if fate.keep or remove_unless_held(storage, name):
                    continue
                gone.append(name)
                self._whole.pop((fate.step, fate.epoch), None)
                logger.info("retention removed step %d of writer %d", fate.step, fate.epoch)
        except CkptError as error:
            logger.warning("retention of steps failed, nothing else is affected: %s", error)
        return gone

    def prune_versions(self) -> list[str]:
        """Delete all but the newest published versions of the run; logs instead of raising.

        Returns:
            Names of those that were deleted.
        """
        storage = self._storage
        gone: list[str] = []
        if self._keep.versions is None:
            return gone
        try:
            fates = review_versions(
                storage, self._keep.versions, self._run_name, whole=self._whole_versions
            )
            for fate in fates:
                if apply_fate(storage, fate) is None:
                    logger.info("retention removed version %s", fate.entry.name)
                    if fate.entry.state != "claimed":
                        gone.append(fate.entry.name)
            # What is whole stays so: the next time it needs no read.
            self._whole_versions = {
                fate.entry.name
                for fate in fates
                if fate.entry.state == "committed" or fate.entry.name in self._whole_versions
            }
        except CkptError as error:
            logger.warning("retention of versions failed, nothing else is affected: %s", error)
        return gone

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
            if storage.has_rename:
                put_back_trash(storage)
            else:
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
        if not self._whole.keys() >= set(lineage):
            entries: list[StepEntry] = list_steps(self._storage)
            self._whole |= {
                (entry.step, entry.epoch): entry.manifest.metrics
                for entry in entries
                if entry.state == "committed" and entry.manifest is not None
            }
            for entry in entries:
                if entry.state == "damaged":
                    logger.warning("%s is damaged and not counted: %s", entry.path, entry.problem)
        return [pair for pair in lineage if pair in self._whole]
