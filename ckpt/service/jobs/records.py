"""What a root says about jobs: sealed documents, each written once but the sign of life.

``jobs/<id>/`` holds ``job.json`` (what is asked for), one ``try-0001.json`` for each time that a
service took it up (exclusive creates, so that two never take the same try), ``beat.json`` (the last
sign of life), ``cancel.json`` and ``result.json`` (an exclusive create: a job ends once). A job
exists once ``job.json`` does and has ended once ``result.json`` does.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, cast, get_args

from ckpt.envelope import Fields, seal, unseal, utc_now
from ckpt.errors import AlreadyExists, DamagedError, NoCheckpoint, ObjectNotFound
from ckpt.job_names import JOBS, job_dir, new_job_id, parse_job, parse_try, try_path
from ckpt.layout import TMP_PREFIX
from ckpt.storage import Storage
from ckpt.wire import FINISHED, ErrorRow, JobKind, JobRow, JobState, VerifiedRow

SCHEMA: Final = 1
ABANDONED_S: Final = 3600.0
"""A directory without a job goes once its id is so old."""
_MAX_TEXT: Final = 10_000


@dataclass(frozen=True, slots=True)
class Job:
    """What was asked for; never changes.

    Attributes:
        id: its name.
        kind: what is to be done.
        params: with what.
        by: name of the token that asked.
        created: ISO 8601, UTC.
    """

    id: str
    kind: JobKind
    params: Mapping[str, Any]
    by: str
    created: str


@dataclass(frozen=True, slots=True)
class Try:
    """One service's go at a job: its number, the machine and process, a nonce."""

    number: int
    host: str
    pid: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Beat:
    """The last sign of life of a try.

    Attributes:
        number: of the try.
        at: ISO 8601, UTC.
        done: how much is done.
        total: of how much, or None.
        stopped: its service has let go of it.
    """

    number: int
    at: str
    done: int
    total: int | None
    stopped: bool

    def age_s(self) -> float:
        """Seconds since it was made, by this machine's clock."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds()


@dataclass(frozen=True, slots=True)
class Result:
    """How a job ended; never changes."""

    state: JobState
    number: int
    finished: str
    result: Mapping[str, Any] | None
    error: ErrorRow | None


class JobBook:
    """The jobs of one root.

    Args:
        storage: the root.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._verdicts: dict[str, Mapping[str, VerifiedRow] | None] = {}

    def ids(self) -> list[str]:
        """Ids of all jobs, oldest first; among them may be one that is just being made."""
        found = (parse_job(entry.name) for entry in self.storage.list(JOBS) if entry.is_dir)
        return sorted(name for name in found if name is not None)

    def create(self, kind: JobKind, params: Mapping[str, Any], by: str) -> Job:
        """Ask for a job."""
        job = Job(new_job_id(), kind, params, by, utc_now())
        body = {
            "id": job.id,
            "kind": kind,
            "params": dict(params),
            "by": by,
            "created": job.created,
        }
        self.storage.put_new(f"{job_dir(job.id)}/job.json", seal("ckpt.job", SCHEMA, body))
        return job

    def read(self, job: str) -> Job:
        """What was asked for.

        Raises:
            ConfigError: that is no id.
            NoCheckpoint: no such job.
            DamagedError: its record does not verify.
        """
        fields = self._document(f"{job_dir(job)}/job.json", "ckpt.job")
        if fields is None:
            raise NoCheckpoint(f"there is no job {job} in {self.storage.url}")
        kind = fields.text("kind", 20)
        if kind not in get_args(JobKind):
            fields.refuse("kind", f"must be one of {get_args(JobKind)}", kind)
        found = Job(
            fields.text("id", 100),
            cast("JobKind", kind),
            fields.json("params"),
            fields.text("by", 100),
            fields.timestamp("created"),
        )
        fields.done()
        if found.id != job:
            fields.refuse("id", f"must be {job}", found.id)
        return found

    def tries(self, job: str) -> int:
        """How often it was taken up."""
        names = (parse_try(entry.name) for entry in self.storage.list(job_dir(job)))
        return max((number for number in names if number is not None), default=0)

    def take(self, job: str, number: int, nonce: str) -> Try | None:
        """Take a job up for the time of that number, or None if somebody else did."""
        mine = Try(number, socket.gethostname(), os.getpid(), nonce)
        body = {"number": number, "host": mine.host, "pid": mine.pid, "nonce": nonce}
        try:
            self.storage.put_new(try_path(job, number), seal("ckpt.try", SCHEMA, body))
        except AlreadyExists:
            return None
        return mine

    def read_try(self, job: str, number: int) -> Try | None:
        """Who took it up then."""
        fields = self._document(try_path(job, number), "ckpt.try")
        if fields is None:
            return None
        found = Try(
            fields.integer("number"),
            fields.text("host", 300),
            fields.integer("pid"),
            fields.text("nonce", 100),
        )
        fields.done()
        return found

    def beat(self, job: str, beat: Beat) -> None:
        """Give a sign of life."""
        body = {
            "number": beat.number,
            "at": beat.at,
            "done": beat.done,
            "total": beat.total,
            "stopped": int(beat.stopped),
        }
        self.storage.put(f"{job_dir(job)}/beat.json", seal("ckpt.beat", SCHEMA, body))

    def read_beat(self, job: str) -> Beat | None:
        """The last sign of life, or None if there is none that can be read."""
        try:
            fields = self._document(f"{job_dir(job)}/beat.json", "ckpt.beat")
            if fields is None:
                return None
            found = Beat(
                number=fields.integer("number"),
                at=fields.timestamp("at"),
                done=fields.integer("done"),
                total=fields.optional("total", fields.integer),
                stopped=bool(fields.integer("stopped", 0, 1)),
            )
            fields.done()
        except DamagedError:
            return None
        return found

    def cancel(self, job: str, by: str) -> None:
        """Ask whoever works at it to let it be; asking again changes nothing."""
        body = {"by": by, "at": utc_now()}
        self.storage.put(f"{job_dir(job)}/cancel.json", seal("ckpt.cancel", SCHEMA, body))

    def cancelled(self, job: str) -> bool:
        """Whether somebody asked for that."""
        return self.storage.exists(f"{job_dir(job)}/cancel.json")

    def finish(self, job: str, result: Result) -> bool:
        """End a job; False if it had ended already."""
        error = result.error
        body = {
            "state": result.state,
            "number": result.number,
            "finished": result.finished,
            "result": None if result.result is None else dict(result.result),
            "error": None if error is None else {"type": error.type, "message": error.message},
        }
        try:
            self.storage.put_new(f"{job_dir(job)}/result.json", seal("ckpt.result", SCHEMA, body))
        except AlreadyExists:
            return False
        return True

    def read_result(self, job: str) -> Result | None:
        """How it ended, or None while it has not.

        Raises:
            DamagedError: the record does not verify.
        """
        fields = self._document(f"{job_dir(job)}/result.json", "ckpt.result")
        if fields is None:
            return None
        state = fields.text("state", 20)
        if state not in FINISHED:
            fields.refuse("state", f"must be one of {FINISHED}", state)
        error = None
        if fields.raw("error") is not None:
            child = fields.child("error")
            error = ErrorRow(child.text("type", 100), child.text("message", _MAX_TEXT))
        found = Result(
            state,
            fields.integer("number"),
            fields.timestamp("finished"),
            fields.optional("result", fields.json),
            error,
        )
        fields.done()
        return found

    def note(self, job: str, name: str, body: Mapping[str, Any]) -> None:
        """Keep something for later tries; the first one to say it is right.

        Args:
            job: its id.
            name: of the note, a plain word.
            body: JSON.
        """
        try:
            data = seal(f"ckpt.{name}", SCHEMA, body)
            self.storage.put_new(f"{job_dir(job)}/{name}.json", data)
        except AlreadyExists:
            return

    def read_note(self, job: str, name: str) -> Mapping[str, Any] | None:
        """What an earlier try kept."""
        path = f"{job_dir(job)}/{name}.json"
        try:
            return unseal(
                self.storage.read(path), f"ckpt.{name}", SCHEMA, f"{self.storage.url}/{path}"
            )
        except ObjectNotFound:
            return None

    def sweep(self, job: str) -> None:
        """Delete what killed writes to the records of a job that has ended have left."""
        for entry in self.storage.list(job_dir(job)):
            if entry.name.startswith(TMP_PREFIX):
                self.storage.delete(f"{job_dir(job)}/{entry.name}")

    def forget(self, job: str) -> None:
        """Delete the records of a job that has ended; its result goes last."""
        self._verdicts.pop(job, None)
        for entry in self.storage.list(job_dir(job)):
            if entry.name != "result.json":
                self.storage.delete(f"{job_dir(job)}/{entry.name}")
        self.storage.delete_tree(job_dir(job))

    def row(self, job: str) -> JobRow:
        """A job as the API shows it.

        Raises:
            ConfigError, NoCheckpoint, DamagedError: as :meth:`read`.
        """
        known, result = self.read(job), self.read_result(job)
        if result is not None:
            return JobRow(
                id=job,
                kind=known.kind,
                state=result.state,
                params=known.params,
                created=known.created,
                by=known.by,
                attempt=result.number,
                finished=result.finished,
                result=result.result,
                error=result.error,
            )
        beat = self.read_beat(job)
        working = beat is not None and not beat.stopped
        return JobRow(
            id=job,
            kind=known.kind,
            state="running" if working else "waiting",
            params=known.params,
            created=known.created,
            by=known.by,
            attempt=0 if beat is None else beat.number,
            done=0 if beat is None else beat.done,
            total=None if beat is None else beat.total,
        )

    def find(self, job: str) -> JobRow | None:
        """As :meth:`row`, without a result; None for one that is being made or deleted."""
        try:
            return replace(self.row(job), result=None)
        except NoCheckpoint:
            return None

    def verified(self) -> dict[str, VerifiedRow]:
        """When each step or version was last read by a job that verified it, and how that ended."""
        found: dict[str, VerifiedRow] = {}
        for job in self.ids():
            if job not in self._verdicts:
                try:
                    row = self.row(job)
                except (NoCheckpoint, DamagedError):
                    continue
                if row.finished is None:
                    continue
                self._verdicts[job] = _verdicts(row)  # it will not change any more
            found |= self._verdicts[job] or {}
        return found

    def unfinished(self, ended: set[str]) -> Iterator[str]:
        """Ids of jobs that have not ended, oldest first.

        Args:
            ended: those that are known to have; more are added.
        """
        for job in self.ids():
            if job in ended:
                continue
            if self.storage.exists(f"{job_dir(job)}/result.json"):
                ended.add(job)
                self.sweep(job)  # whoever ended it may have been killed at that
            elif self.storage.exists(f"{job_dir(job)}/job.json"):
                yield job
            elif time.time() - int(job.split("-")[1]) / 1000 > ABANDONED_S:
                self.storage.delete_tree(job_dir(job))  # whoever recorded it was killed at that

    def _document(self, path: str, kind: str) -> Fields | None:
        where = f"{self.storage.url}/{path}"
        try:
            data = self.storage.read(path)
        except ObjectNotFound:
            return None
        return Fields(unseal(data, kind, SCHEMA, where), where)


def _verdicts(row: JobRow) -> dict[str, VerifiedRow] | None:
    """What a job that has ended says of steps and versions; None if it is no such job."""
    checked = (row.result or {}).get("checked")
    if row.kind != "verify" or not isinstance(checked, dict) or row.finished is None:
        return None
    return {name: VerifiedRow(row.finished, bool(ok), row.id) for name, ok in checked.items()}
