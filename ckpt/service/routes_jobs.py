"""Operations about work that takes long: exports, verification, pruning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ckpt.catalog import find_step
from ckpt.job_names import EXPORTS, export_dir, parse_export
from ckpt.layout import MANIFEST, MAX_EPOCH, MAX_STEP
from ckpt.wire import API, ExportList, ExportRow, JobKind, JobList, JobRow

from .answers import RESPONSES
from .auth import Needs, Scope, principal_of
from .jobs.work import read_export
from .roots import ServedRoot
from .routes_files import EXPORT_NAME
from .routes_runs import NAME, Root
from .rows import file_row

JobId = Annotated[str, Path(pattern=r"^job-[0-9]{13}-[0-9a-f]{8}$")]

router = APIRouter(prefix=API, tags=["jobs"], responses=RESPONSES)
_READ = [Depends(Needs(Scope.read))]
_ADMIN = [Depends(Needs(Scope.admin))]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class ExportJob(_Strict):
    """Consolidate the adapter of a step (by default the newest whole one) into a PEFT directory."""

    kind: Literal["export"]
    step: int | None = Field(default=None, ge=0, le=MAX_STEP)
    epoch: int | None = Field(default=None, ge=1, le=MAX_EPOCH)
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


class VerifyJob(_Strict):
    """Read every byte of all steps and versions, or of one, and compare the checksums."""

    kind: Literal["verify"]
    step: int | None = Field(default=None, ge=0, le=MAX_STEP)
    epoch: int | None = Field(default=None, ge=1, le=MAX_EPOCH)
    version: str | None = Field(default=None, pattern=NAME)

    @model_validator(mode="after")
    def _one(self) -> VerifyJob:
        if self.version is not None and (self.step, self.epoch) != (None, None):
            raise ValueError("step and version exclude each other")
        return self


class PruneJob(_Strict):
    """Delete what no rule keeps.

    Without `confirm` it only says what that would be; its result has the `plan` with which the same
    rules are then confirmed.
    """

    kind: Literal["prune"]
    keep_latest: int | None = Field(default=None, ge=1, le=MAX_STEP)
    every: int | None = Field(default=None, ge=1, le=MAX_STEP)
    best: int | None = Field(default=None, ge=1, le=MAX_STEP)
    metric: str | None = Field(default=None, min_length=1, max_length=200)
    mode: Literal["max", "min"] = "max"
    keep_versions: int | None = Field(default=None, ge=1, le=MAX_STEP)
    run_name: str | None = Field(default=None, pattern=NAME)
    confirm: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _rules(self) -> PruneJob:
        if self.keep_latest is None and self.keep_versions is None:
            raise ValueError("name a rule: keep_latest for steps, keep_versions for versions")
        if self.keep_latest is None and (self.every, self.best, self.metric) != (None, None, None):
            raise ValueError("every, best and metric add to keep_latest")
        if (self.best is None) != (self.metric is None):
            raise ValueError("best and metric belong together")
        return self


JobBody = Annotated[ExportJob | VerifyJob | PruneJob, Field(discriminator="kind")]


@router.post("/runs/{run}/jobs", dependencies=_ADMIN, status_code=202)
async def start_job(request: Request, root: Root, body: JobBody) -> JobRow:
    """Record a job; this service, or another one on the root, takes it up."""
    caller = principal_of(request)
    by = "unknown" if caller is None else caller.name
    return await root.call(_start, root, body, by)


def _start(root: ServedRoot, body: ExportJob | VerifyJob | PruneJob, by: str) -> JobRow:
    kind: JobKind = body.kind
    params: dict[str, Any] = body.model_dump(exclude={"kind"}, exclude_none=True)
    if isinstance(body, ExportJob):
        # Settled now: a second go must not find a newer step.
        entry = find_step(root.storage, body.step, epoch=body.epoch)
        params |= {"step": entry.step, "epoch": entry.epoch}
    job = root.jobs.submit(kind, params, by)
    return JobRow(job.id, kind, "waiting", params, job.created, by)


@router.get("/runs/{run}/jobs", dependencies=_READ)
async def list_jobs(
    root: Root, limit: Annotated[int, Query(ge=1, le=200, description="How many.")] = 50
) -> JobList:
    """The newest jobs, newest first, without their results."""
    return await root.call(_jobs, root, limit)


def _jobs(root: ServedRoot, limit: int) -> JobList:
    rows: list[JobRow] = []
    for job in reversed(root.jobs.book.ids()):
        if len(rows) == limit:
            break
        row = root.jobs.book.find(job)
        if row is not None:
            rows.append(row)
    return JobList(tuple(rows))


@router.get("/runs/{run}/jobs/{job}", dependencies=_READ)
async def show_job(root: Root, job: JobId) -> JobRow:
    """A job with its progress, and its result once it has ended."""
    return await root.call(root.jobs.book.row, job)


@router.post("/runs/{run}/jobs/{job}/cancel", dependencies=_ADMIN, status_code=202)
async def cancel_job(request: Request, root: Root, job: JobId) -> JobRow:
    """Ask for a job to be let be, wherever it runs; one that has ended stays as it is."""
    caller = principal_of(request)
    by = "unknown" if caller is None else caller.name

    def cancel() -> JobRow:
        root.jobs.cancel(job, by)
        return root.jobs.book.row(job)

    return await root.call(cancel)


@router.get("/runs/{run}/exports", dependencies=_READ)
async def list_exports(root: Root) -> ExportList:
    """The adapters that jobs exported."""
    return await root.call(_exports, root)


def _exports(root: ServedRoot) -> ExportList:
    rows = []
    for item in root.storage.list(EXPORTS):
        if item.is_dir and parse_export(item.name) is not None:
            if not root.storage.exists(f"{export_dir(item.name)}/{MANIFEST}"):
                continue  # being written, on an object store
            made = read_export(root.storage, item.name)
            rows.append(
                ExportRow(
                    name=made.name,
                    step=made.step,
                    epoch=made.epoch,
                    dtype=made.dtype,
                    created=made.created,
                    adapter_sha256=made.adapter_sha256,
                    files=tuple(map(file_row, made.files)),
                )
            )
    return ExportList(tuple(rows))


@router.delete("/runs/{run}/exports/{export}", dependencies=_ADMIN, status_code=204)
async def delete_export(root: Root, export: Annotated[str, Path(pattern=EXPORT_NAME)]) -> None:
    """Delete an exported adapter; the step it is from stays."""

    def remove() -> bool:
        path = export_dir(export)
        if not root.storage.exists(f"{path}/{MANIFEST}"):
            return False
        root.storage.delete(f"{path}/{MANIFEST}")  # from now on there is no such export
        root.storage.delete_tree(path)
        return True

    if not await root.call(remove):
        raise HTTPException(404, "there is no such export")
