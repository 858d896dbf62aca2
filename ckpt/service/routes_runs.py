"""Operations that show what the roots hold: runs, steps, versions, leases, pins."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Depends, HTTPException, Path, Query, Request

from ckpt.catalog import find_step, step_dirs
from ckpt.errors import CkptError, NoCheckpoint
from ckpt.holds import list_leases, live_leases
from ckpt.layout import MAX_EPOCH, MAX_STEP
from ckpt.versions import find_version
from ckpt.wire import (
    API,
    LeaseList,
    RunList,
    RunRow,
    StepDetail,
    StepList,
    VersionDetail,
    VersionList,
)

from .answers import RESPONSES
from .auth import Needs, Scope
from .roots import Roots, ServedRoot, root_of
from .rows import lease_row, step_detail, step_row, version_detail, version_row

NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}$"
STEP_NAME: Final = r"^step-[0-9]{8}\.w[0-9]{4}$"

Root = Annotated[ServedRoot, Depends(root_of)]
RunName = Annotated[
    str | None,
    Query(
        pattern=NAME, description="First part of the versions' names; needed if there are several."
    ),
]
VersionName = Annotated[str, Path(pattern=NAME, description="A version's exact name.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Length of the page.")]

router = APIRouter(
    prefix=API, tags=["runs"], responses=RESPONSES, dependencies=[Depends(Needs(Scope.read))]
)


@router.get("/runs")
async def list_runs(request: Request) -> RunList:
    """The roots that are served, with the newest versions of each."""
    roots: Roots = request.app.state.roots
    return RunList(tuple([await _run_row(root) for root in roots]))


@router.get("/runs/{run}")
async def show_run(root: Root) -> RunRow:
    """One root."""
    return await _run_row(root)


async def _run_row(root: ServedRoot) -> RunRow:
    try:
        await root.watcher.refresh()
        steps = await root.call(step_dirs, root.storage)
    except (CkptError, TimeoutError) as error:
        problem = (
            str(error) if isinstance(error, CkptError) else "the store does not answer in time"
        )
        return RunRow(root.name, root.url, root.storage.has_rename, problem=problem)
    newest = root.watcher.newest_of_all()
    return RunRow(
        run=root.name,
        url=root.url,
        has_rename=root.storage.has_rename,
        run_names=tuple(newest),
        latest={run: version.name for run, version in newest.items()},
        newest_step=max((step for step, _epoch in steps), default=None),
    )


@router.get("/runs/{run}/steps")
async def list_steps(
    root: Root,
    before: Annotated[
        str | None, Query(pattern=STEP_NAME, description="The page below it.")
    ] = None,
    limit: Limit = 100,
) -> StepList:
    """Steps with their state, newest first."""
    return await root.call(root.listings.steps, before, limit)


@router.get("/runs/{run}/steps/{step}")
async def show_step(
    root: Root,
    step: Annotated[int, Path(ge=0, le=MAX_STEP)],
    epoch: Annotated[
        int | None, Query(ge=1, le=MAX_EPOCH, description="The writer; for abandoned steps.")
    ] = None,
) -> StepDetail:
    """One step down to its tensors and their pieces."""
    return await root.call(_step_detail, root, step, epoch)


@router.get("/runs/{run}/latest-step")
async def show_latest_step(root: Root) -> StepDetail:
    """The newest whole step."""
    return await root.call(_step_detail, root, None, None)


def _step_detail(root: ServedRoot, step: int | None, epoch: int | None) -> StepDetail:
    entry = find_step(root.storage, step, epoch=epoch)
    if entry.manifest is None:
        raise NoCheckpoint(f"step {entry.step} has no manifest: {entry.problem}")
    return step_detail(step_row(entry), entry.manifest)


@router.get("/runs/{run}/versions")
async def list_versions(
    root: Root,
    run_name: RunName = None,
    before: Annotated[str | None, Query(pattern=NAME, description="The page below it.")] = None,
    limit: Limit = 100,
) -> VersionList:
    """Published versions, newest first."""
    return await root.call(root.listings.versions, run_name, before, limit)


@router.get("/runs/{run}/versions/{version}")
async def show_version(root: Root, version: VersionName) -> VersionDetail:
    """One committed version, with its sealed manifest."""
    return await root.call(_version_detail, root, version)


def _version_detail(root: ServedRoot, name: str) -> VersionDetail:
    root.registry.get(name)  # says why it cannot be had
    entry = find_version(root.storage, name)
    if entry.manifest is None:
        raise HTTPException(404, f"{name} was deleted at this moment")
    return version_detail(version_row(entry), entry.manifest)


@router.get("/runs/{run}/leases")
async def list_all_leases(root: Root) -> LeaseList:
    """Who uses which version, also leases that have run out."""
    return await root.call(_leases, root, None)


@router.get("/runs/{run}/versions/{version}/leases")
async def list_version_leases(root: Root, version: VersionName) -> LeaseList:
    """Who uses a version."""
    return await root.call(_leases, root, version)


def _leases(root: ServedRoot, version: str | None) -> LeaseList:
    found = list_leases(root.storage, version)
    live = live_leases(found)
    return LeaseList(tuple(lease_row(lease, live=lease in live) for lease in found))
