"""The ranks' tiers taken together: who shares one, and how a step commits in several.

Ranks that were given the same directory share a tier; the lowest of them leads it. Where there
is one tier for all, a step commits in it like in any directory. Where nodes have tiers of their
own, every leader commits the same manifest in its tier first and rank 0 commits last: what is not
in rank 0's tier is not there at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from .catalog import check_sizes, read_lineage, step_dirs
from .commit import Place, commit_step
from .errors import CkptError, ConfigError, DamagedError, Superseded, UnrestoredRoot, VoteTimeout
from .layout import PART, STATE, parse_shard_name
from .manifest import StepManifest
from .part import Part, copies_json, copies_of, parse_copies
from .session import Session
from .storage import Storage
from .storage.redact import public_url
from .supervisor import Supervisor
from .tier import Outcome, Tier
from .types import Chunk, Retention, TensorRecord
from .vote import Board, RemoteFailure

_TOPIC: Final = "tiers"
_POLL_SECONDS: Final = 0.1


class TierGroup:
    """This rank's tier among those of the other ranks; made by :func:`join_tiers`.

    Args:
        tier: this rank's tier.
        remote: the root that decides about writers and versions, and that is mirrored to.
        groups: the ranks that share a tier, one group a tier; rank 0 is in the first.
        rank: this rank.
        retention: what is kept.
    """

    def __init__(
        self,
        tier: Tier,
        remote: Storage,
        groups: tuple[tuple[int, ...], ...],
        rank: int,
        retention: Retention,
    ) -> None:
        self.tier = tier
        self.remote = remote
        self.groups = groups
        self._mine = next(group for group in groups if rank in group)
        self._rank = rank
        self._retention = retention
        self._supervisor: Supervisor | None = None

    @property
    def storage(self) -> Storage:
        """Where steps are committed."""
        return self.tier.storage

    @property
    def split(self) -> bool:
        """Whether there is more than one tier."""
        return len(self.groups) > 1

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that share its tier."""
        return self._rank == self._mine[0]

    def near(self, rank: int) -> bool:
        """Whether a rank's tier is rank 0's."""
        return rank in self.groups[0]

    # ---- the uploader

    def start(
        self,
        root: str | os.PathLike[str],
        nonce: str,
        run: str,
        storage_options: Mapping[str, Any] | None,
    ) -> None:
        """Leaders: see to it that the tier has an uploader, from now on until :meth:`close`.

        Args:
            root: the root's path or URL as the caller gave it.
            nonce: begins the attempts of all ranks of this manager.
            run: first part of the names of published versions.
            storage_options: for the root's store.
        """
        if self.leads:
            self.tier.sweep()
            local = self.remote.local_path("")
            url = os.fspath(root) if local is None else str(local)
            session = Session.begin(nonce, url, run, self._retention)
            self._supervisor = Supervisor(self.tier, session, storage_options)

    def close(self) -> None:
        """Leave the uploader to itself; it goes on until its queue is empty."""
        if self._supervisor is not None:
            self._supervisor.close()

    def metrics(self) -> dict[str, float]:
        """What the uploader last said; leaders only.

        ``mirror_queue``, ``mirror_bytes`` and ``mirror_requests``.
        """
        beat = None if self._supervisor is None else self._supervisor.beat
        if beat is None:
            return {}
        return {
            "mirror_queue": beat.queue,
            "mirror_bytes": beat.sent_bytes,
            "mirror_requests": beat.requests,
        }

    def steps(self) -> set[int]:
        """Numbers of the steps in this rank's tier that are in the lineage."""
        here = {item.pair for item in self.tier.check_run(self.remote) if item.pair is not None}
        lineage = read_lineage(self.remote, here.union(step_dirs(self.remote))).steps
        return {pair[0] for pair in lineage if pair in here}

    def wait_mirrored(self, timeout: float | None) -> None:
        """Block until everything in this rank's tier is settled.

        Raises:
            VoteTimeout: not within ``timeout`` seconds; says what is left and why.
            DamagedError: something in the tier does not verify and was not mirrored.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while queue := self.tier.queue():
            if deadline is not None and time.monotonic() >= deadline:
                note = f"; the uploader says: {self.tier.note}" if self.tier.note else ""
                msg = (
                    f"{', '.join(item.name for item in queue[:5])} not mirrored from "
                    f"{self.tier.storage.url} to {self.remote.url} within {timeout:g} s{note}"
                )
                raise VoteTimeout(msg)
            time.sleep(_POLL_SECONDS)
        broken = [n for n, outcome in self.tier.outcomes().items() if outcome is Outcome.damaged]
        if broken:
            msg = f"{', '.join(sorted(broken))} in {self.tier.storage.url} damaged, not mirrored"
            raise DamagedError(msg)

    # ---- writers

    def check_restored(self, *, restored: bool, fresh: bool) -> None:
        """Rank 0, before a claim: steps that only the tier holds are steps as well.

        Raises:
            UnrestoredRoot: there are some, and the caller neither restored nor said ``fresh``.
        """
        steps = self.tier.steps()
        if steps and not restored and not fresh:
            msg = (
                f"{self.tier.storage.url} holds steps (up to {steps[-1].name}) but this manager "
                "has not restored; call restore() first, or pass fresh=True to start a new run"
            )
            raise UnrestoredRoot(msg)

    def claimed(self, epoch: int) -> None:
        """Every rank, after a claim: its leader takes the record over into the tier.

        Raises:
            ConfigError: the tier holds steps of another run.
            StorageError: the root cannot be read.
        """
        if self.leads:
            self.tier.check_run(self.remote)
            self.tier.record_writer(self.remote, epoch)

    def check_current(self, epoch: int) -> None:
        """Refuse to go on once the uploader met a newer writer at the root.

        Raises:
            Superseded: it has.
        """
        beat = None if self._supervisor is None else self._supervisor.beat
        newest = 0 if beat is None or beat.superseded is None else beat.superseded
        if newest > epoch:
            msg = (
                f"writer {newest} has taken over {self.remote.url}; this is writer {epoch}, whose "
                "saves no longer count. Stop this trainer, or restore() to take over again"
            )
            raise Superseded(msg)

    # ---- a step in several tiers

    def commit(
        self,
        board: Board,
        topic: str,
        where: Place,
        manifest: StepManifest,
        copies: Sequence[TensorRecord],
    ) -> None:
        """Rank 0: commit in the other tiers, then in this one.

        Args:
            board: access to the other ranks.
            topic: the save's topic.
            where: where its files were written, in every tier.
            manifest: its manifest, which names the files of all tiers.
            copies: replicas in these files that the manifest does not name.

        Raises:
            RemoteFailure: a leader could not commit; nothing is here then.
            CkptError: see :func:`ckpt.commit.commit_step`.
        """
        here = f"{topic}/{_TOPIC}"
        state = self.storage.read(where.path(STATE)).decode("ascii")
        extra = copies_of(copies)
        message = {
            "manifest": manifest.to_bytes().decode(),
            "state": state,
            "copies": copies_json(extra),
        }
        board.decide(here, message)
        board.answer(here, None)
        board.gather(here)
        self._write_part(where, manifest, extra, coordinator=True)
        commit_step(self.storage, where, manifest)

    def abort(self, board: Board, topic: str, error: BaseException) -> None:
        """Rank 0: nothing is to be committed anywhere."""
        board.abort(f"{topic}/{_TOPIC}", error)

    def follow(self, board: Board, topic: str, where: Place) -> bool:
        """Every other rank: its leader commits in its tier; whether this rank did.

        A failure here goes to rank 0, whose verdict on the save then says so.

        Raises:
            SaveAborted: rank 0 decided nothing in time, or is gone.
        """
        here = f"{topic}/{_TOPIC}"
        verdict = board.verdict(here)
        if verdict.failure is not None:
            return False
        committed = False
        if self.leads and not self.near(self._rank):
            try:
                self._commit_part(where, verdict.value)
                committed = True
            except CkptError as error:
                board.fail(here, error)
                return False
        board.answer(here, None)
        return committed

    def prune(self) -> None:
        """Leaders, after a commit: retention in the tier; logs instead of raising."""
        if self.leads:
            self.tier.prune(self._retention.latest, self._retention.versions)

    def _commit_part(self, where: Place, value: Mapping[str, Any]) -> None:
        manifest = StepManifest.from_bytes(value["manifest"].encode(), "rank 0's manifest")
        self.storage.put(where.path(STATE), value["state"].encode())
        copies = parse_copies(value["copies"], "rank 0's copies")
        part = self._write_part(where, manifest, copies, coordinator=False)
        records = [record for record in manifest.files if record.name in part.files]
        for problem in check_sizes(self.storage, where.base, records):
            raise DamagedError(problem.message)
        commit_step(self.storage, where, manifest)

    def _write_part(
        self,
        where: Place,
        manifest: StepManifest,
        copies: Sequence[tuple[str, Chunk]],
        *,
        coordinator: bool,
    ) -> Part:
        shards = ((record.name, parse_shard_name(record.name)) for record in manifest.files)
        mine = [name for name, shard in shards if shard is None or shard[0] in self._mine]
        here = tuple((name, chunk) for name, chunk in copies if chunk.file in mine)
        part = Part(tuple(mine), coordinator, here)
        self.storage.put(where.path(PART), part.to_bytes())
        return part


def join_tiers(
    local_tier: str | os.PathLike[str] | None,
    root: str | os.PathLike[str],
    remote: Storage,
    board: Board,
    retention: Retention,
) -> TierGroup | None:
    """Find out which ranks share a tier; every rank calls this once per manager.

    Args:
        local_tier: this rank's tier, or None on all ranks.
        root: the root's path or URL as the caller gave it.
        remote: its store.
        board: access to the other ranks.
        retention: what is kept.

    Raises:
        ConfigError: a tier that cannot be one, or a tier on some ranks only.
        StorageError: it cannot be read or written.
        SaveAborted: another rank failed, or did not answer in time.
    """
    tier: Tier | None = None
    own: CkptError | None = None
    try:
        if local_tier is not None:
            check_remote(root, remote)
            tier = Tier(local_tier, remote.url)
        board.answer(_TOPIC, None if tier is None else tier.id)
    except CkptError as error:
        own = error
        board.fail(_TOPIC, error)
    if board.rank == 0:
        try:
            groups = _grouped(board.gather(_TOPIC))
            board.decide(_TOPIC, groups)
        except (CkptError, RemoteFailure) as error:
            failure = board.abort(_TOPIC, error)
            raise (own or failure.rebuild(keep=True)) from error
    else:
        verdict = board.verdict(_TOPIC)
        if verdict.failure is not None:
            raise own or verdict.failure.rebuild(keep=True)
        groups = verdict.value
    if tier is None:
        return None
    return TierGroup(tier, remote, tuple(map(tuple, groups)), board.rank, retention)


def check_remote(root: str | os.PathLike[str], remote: Storage) -> None:
    """Refuse a root that another process could not mirror to, or whose URL is a secret.

    Raises:
        ConfigError: it is one.
    """
    text = os.fspath(root)
    if remote.local_path("") is not None:
        return
    if urlsplit(text).scheme == "memory":
        msg = f"{text} lies in this process alone: a local tier needs a root that others can reach"
        raise ConfigError(msg)
    if public_url(text) != text.rstrip("/"):
        msg = (
            "with a local tier the root's URL is written into the tier, so it must not hold "
            "credentials or a query; use storage_options, the environment or a profile"
        )
        raise ConfigError(msg)


def _grouped(ids: list[str | None]) -> list[list[int]]:
    """The ranks of each tier, in the order of their lowest rank.

    Raises:
        ConfigError: some ranks have a tier and some have none.
    """
    groups: dict[str | None, list[int]] = {}
    for rank, name in enumerate(ids):
        groups.setdefault(name, []).append(rank)
    if None in groups and len(groups) > 1:
        without = ", ".join(map(str, groups[None]))
        raise ConfigError(f"local_tier is given on some ranks only; rank {without} has none")
    return list(groups.values())
