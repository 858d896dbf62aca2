"""The background half of a save: write the slot, vote, commit, publish.

Runs on one thread per manager and talks to other ranks only through the board, with deadlines.
Rank 0 coordinates; whatever goes wrong on any rank before the commit aborts the step on all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .about import package_version
from .adapter_plan import AdapterPlans
from .ballot import ballot, count
from .commit import Place, check_current, commit_step, discard, place
from .envelope import utc_now
from .errors import (
    CkptError,
    CommitUnknown,
    DamagedError,
    PlanError,
    PublishError,
    SaveAborted,
    Superseded,
)
from .job import (
    Job,
    TensorTable,
    compose_state,
    located,
    look_topic,
    plan_topic,
    save_topic,
)
from .layout import ADAPTERS, STATE, shard_name
from .manifest import StepManifest, VersionManifest
from .plan import Piece, difference
from .publish import publish_version
from .slot_source import Files, PartedFiles, SlotSource
from .source import StepSource
from .storage import Storage, put_checked
from .tier_group import TierGroup
from .types import FileRecord
from .vote import Board, Failure, RemoteFailure

logger = logging.getLogger(__name__)


class EchoError(SaveAborted):
    """Another rank sat this save out because it was raising an error that all ranks know."""


class SkippedSave(SaveAborted):
    """The save gave way to a newer state before all ranks had written it."""


class SavePipeline:
    """Everything that a manager's background thread does with a job.

    Args:
        storage: where steps are committed and versions made: the root, or the local tier.
        board: this thread's access to the other ranks.
        run_name: first part of the names of published versions.
        publish_dtype: dtype of published adapters.
        tiers: the local tiers, or None.
    """

    def __init__(
        self,
        storage: Storage,
        board: Board,
        *,
        run_name: str,
        publish_dtype: str,
        tiers: TierGroup | None = None,
    ) -> None:
        self._storage = storage
        self._board = board
        self._run_name = run_name
        self._publish_dtype = publish_dtype
        self._tiers = tiers
        self._split = tiers if tiers is not None and tiers.split else None
        self._done_topics: list[str] = []
        self._tensors = TensorTable()
        self._plans = AdapterPlans()
        self._last_number: int | None = None

    def run(self, job: Job) -> None:
        """Take a job from its copied slot to its commit, and publish it.

        Raises:
            CkptError: why there is no step (all ranks raise) or no version.
        """
        try:
            if job.slot is not None:
                job.slot.wait_copied()
            if not job.handle.staged.done():
                job.handle.staged.set_result(None)
            manifest = self._persist(job) if job.resumable or self._board.world > 1 else None
            self._finish(job, manifest)
        finally:
            job.arena.release(job.slot)

    def refuse(self, seq: int, error: BaseException, *, echo: bool) -> None:
        """Tell the others that this rank takes no part in a save, and why."""
        if self._board.world == 1:
            return
        topics = (look_topic(seq), plan_topic(seq), save_topic(seq))
        self._done_topics += topics
        for topic in topics:
            self._board.fail(topic, error, echo=echo)
            if self._board.rank == 0:
                self._board.abort(topic, error, echo=echo)
        if self._split is not None and self._board.rank == 0:
            self._split.abort(self._board, save_topic(seq), error)

    def _persist(self, job: Job) -> StepManifest | None:
        """Write, vote, and on rank 0 commit; returns the manifest there."""
        board = self._board
        where = self._place(job)
        own: BaseException | None = None
        if not job.planned:
            board.mark(job.topic)
        try:
            began = time.perf_counter()
            record = self._write(job, where)
            job.handle.metrics.write_ms = 1e3 * (time.perf_counter() - began)
            board.answer(job.topic, ballot(job, record))
        except Exception as error:  # noqa: BLE001 - goes to every rank's vote and is raised below
            own = error
            board.fail(job.topic, error)
        began = time.perf_counter()
        manifest: StepManifest | None = None
        failure: Failure | None
        ahead = False
        if board.rank == 0:
            manifest, failure, problem = self._coordinate(job, where)
            own = own or problem
        else:
            ahead = (
                job.resumable
                and self._split is not None
                and self._split.follow(board, job.topic, where)
            )
            failure = board.verdict(job.topic).failure
        if failure is not None:
            # While the manifest's fate is open, the step may exist and need its files.
            if failure.kind != CommitUnknown.__name__:
                discard(self._storage, where.final if ahead else where.scratch)
            raise aborted(job, failure, board.rank, own)
        job.handle.metrics.commit_ms = 1e3 * (time.perf_counter() - began)
        return manifest

    def _coordinate(
        self, job: Job, where: Place
    ) -> tuple[StepManifest | None, Failure | None, Exception | None]:
        """Rank 0: check every rank's ballot, make the step exist, and tell the others."""
        board = self._board
        contrary = None if job.planned else plan_topic(job.seq)
        try:
            ballots = board.gather(job.topic, contrary=contrary)
            board.forget(self._done_topics)
            self._done_topics = [
                job.topic,
                look_topic(job.seq),
                plan_topic(job.seq),
                *(f"{job.topic}/{what}" for what in ("version", "tiers")),
            ]
            job.costs = [said["cost"] for said in ballots]
            count(job, ballots)
            manifest = self._manifest(job, where, ballots)
            if self._tiers is not None:
                self._tiers.check_current(job.epoch)
            if job.resumable:
                checked = self._tensors.checked(manifest.tensors, manifest.files)
                if self._split is not None:
                    copies = located(job.layout.copies, job.files)
                    self._split.commit(board, job.topic, where, manifest, copies)
                else:
                    commit_step(self._storage, where, manifest, checked)
        except Exception as error:  # noqa: BLE001 - put to the vote: every rank raises it
            cause = self._explain(job, error)
            # A rank that plans while this one does not waits on the other topic.
            board.abort(plan_topic(job.seq), cause)
            if self._split is not None:
                self._split.abort(board, job.topic, cause)
            return None, board.abort(job.topic, cause), cause
        board.decide(job.topic, None)
        return manifest, None, None

    def _write(self, job: Job, where: Place) -> FileRecord | None:
        """Write this rank's shard, if it has one."""
        if job.slot is None:
            return None
        if not job.resumable and self._board.rank == 0:
            # A version is made on rank 0, which has these bytes in its slot.
            return FileRecord(where.name(shard_name(0, self._board.world)), job.slot.nbytes, 0, ())
        name = shard_name(self._board.rank, self._board.world)
        data = job.slot.buffer()
        record: FileRecord | None = None
        if job.publish and self._split is not None and not self._split.near(self._board.rank):
            # Rank 0 cannot see this rank's tier; the root is what both can reach.
            path = f"{_parts(job)}/{name}"
            record = put_checked(self._split.remote, path, data, name=where.name(name))
        if job.resumable or record is None:
            record = put_checked(self._storage, where.path(name), data, name=where.name(name))
        return record

    def _place(self, job: Job) -> Place:
        if job.resumable and job.step is not None:
            return place(self._storage, job.step, job.epoch, job.attempt)
        parts = _parts(job)
        return Place(base=parts, prefix="", scratch=parts, final=parts)

    def _manifest(
        self, job: Job, where: Place, ballots: Sequence[Mapping[str, Any]]
    ) -> StepManifest:
        """Write ``state.json``, check the files' sizes, and describe it all."""
        storage = self._storage
        written = list(job.files.items())
        if job.resumable:
            state = compose_state(job.shared, [ballot["mine"] for ballot in ballots])
            record = put_checked(storage, where.path(STATE), state, name=where.name(STATE))
            written.append((0, record))
        for rank, record in written:
            if not job.resumable and rank == 0:
                continue  # its bytes stay in the slot
            if self._split is not None and not self._split.near(rank):
                continue  # its own tier's leader looks at it
            path = f"{where.base}/{record.name}"
            size = storage.size(path)
            if size != record.size:
                msg = f"{path} has {size} bytes, rank {rank} wrote {record.size}"
                raise DamagedError(msg)
        files = [record for _rank, record in written]
        return StepManifest(
            step=job.step or 0,
            epoch=job.epoch,
            attempt=job.attempt,
            created=utc_now(),
            writer_version=package_version(),
            world_size=self._board.world,
            mesh=job.layout.mesh,
            fingerprint=job.layout.fingerprint,
            base=job.base,
            export=job.export,
            tensors=self._tensors.located(job.layout.records, job.files),
            files=tuple(sorted(files, key=lambda record: record.name)),
            adapter_sha256=None,
            policy_version=job.policy_version,
            metrics=job.metrics,
        )

    def _explain(self, job: Job, error: Exception) -> Exception:
        """Say more than the error itself does.

        A newer writer sweeps away what an older one has under way, and only some ranks may find
        that the layout changed: then the cause is one that the error does not name.
        """
        if isinstance(error, (OSError, RemoteFailure)) and job.resumable:
            try:
                check_current(self._storage, job.epoch)
            except CkptError as superseded:
                return superseded if isinstance(superseded, Superseded) else error
        if job.planned or job.layout.parted or not isinstance(error, PlanError):
            return error
        for rank in range(1, self._board.world):
            answer = self._board.peek(plan_topic(job.seq), rank)
            if answer is not None:
                pieces = [Piece.from_json(piece) for piece in answer["pieces"]]
                found = difference(job.layout.held, pieces, rank)
                if found:
                    return PlanError(f"{error}: {found}")
        return error

    def _finish(self, job: Job, manifest: StepManifest | None) -> None:
        """Settle the commit, then publish; a failed publish leaves the step as it is."""
        handle = job.handle
        job.measured()
        handle.committed.set_result(job.step if job.resumable else None)
        if not job.publish:
            handle.published.set_result(None)
            return
        began = time.perf_counter()
        if self._board.rank == 0:
            version = self._publish(job, manifest)
        else:
            verdict = self._board.verdict(f"{job.topic}/version")
            if verdict.failure is not None:
                raise PublishError(f"rank 0: {verdict.failure.message}")
            version = VersionManifest.from_bytes(verdict.value.encode(), "rank 0's answer")
        handle.metrics.publish_ms = 1e3 * (time.perf_counter() - began)
        handle.metrics.publish_lag_ms = 1e3 * (time.perf_counter() - job.started)
        job.measured()
        handle.published.set_result(version)

    def _publish(self, job: Job, manifest: StepManifest | None) -> VersionManifest:
        """Rank 0: make a version from the slot and the other ranks' files."""
        topic = f"{job.topic}/version"
        where = self._place(job)
        export = job.export
        if export is None:  # the manager refuses this before anything is copied
            raise AssertionError
        try:
            source = self._source(job, manifest, where)
            authority = None if self._tiers is None else self._tiers.remote
            version = publish_version(
                self._storage,
                run=self._run_name,
                export=export,
                source=source,
                dtype=self._publish_dtype,
                step=job.step,
                policy_version=job.policy_version,
                epoch=job.epoch,
                attempt=job.attempt,
                base=job.base,
                probe=job.probe,
                authority=authority,
                plans=self._plans,
                after=self._last_number,
            )
            self._last_number = version.number
        except Exception as error:
            self._board.abort(topic, error)
            raise
        finally:
            if not job.resumable and self._board.world > 1:
                discard(self._storage, where.scratch)
            if self._split is not None:
                discard(self._split.remote, _parts(job))
        self._board.decide(topic, version.to_bytes().decode())
        return version

    def _source(self, job: Job, manifest: StepManifest | None, where: Place) -> SlotSource:
        if manifest is None:  # one rank and no step: all bytes are in the slot
            record = FileRecord(shard_name(0, 1), 0 if job.slot is None else job.slot.nbytes, 0, ())
            tensors = self._tensors.located(job.layout.records, {0: record})
            return SlotSource(tensors, job.slot, record.name, None)
        directory = where.final
        own = job.files.get(0)
        stored: Files = StepSource(self._storage, directory, manifest)
        if self._split is not None:
            away = {f.name for r, f in job.files.items() if not self._split.near(r)}
            parts = StepSource(self._split.remote, _parts(job), manifest)
            stored = PartedFiles(stored, parts, away)
        return SlotSource(manifest.tensors, job.slot, None if own is None else own.name, stored)


def _parts(job: Job) -> str:
    """Where ranks lay down what rank 0 needs for a version and cannot read otherwise."""
    return f"{ADAPTERS}/.parts-{job.attempt}"


def aborted(job: Job, failure: Failure, rank: int, own: BaseException | None) -> CkptError:
    """The error of an aborted save, with its cause where this rank has it."""
    if failure.echo:
        error: CkptError = EchoError(
            f"step {job.step}: rank {failure.rank} was raising an earlier error and did not save"
        )
    elif failure.kind == SkippedSave.__name__:
        error = SkippedSave(failure.message)
    else:
        rebuilt = failure.rebuild()
        what = "publish" if not job.resumable else f"save of step {job.step}"
        error = type(rebuilt)(f"{what} aborted: {rebuilt}")
    if own is not None and failure.rank == rank:
        error.__cause__ = own
    return error
