"""The pages: runs, a run's timeline, its versions and replicas, a step, a version, heat maps."""

from __future__ import annotations

import asyncio
import functools
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, ParamSpec

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response

from ckpt.catalog import find_step
from ckpt.errors import CkptError, ConfigError, NoCheckpoint
from ckpt.handoff.replica_record import ReplicaRecord, read_replicas
from ckpt.holds import Lease, list_leases, live_leases
from ckpt.layout import parse_step_dir, parse_version_name
from ckpt.manifest import VersionManifest
from ckpt.service.answers import status_of
from ckpt.service.auth import Needs, Scope
from ckpt.service.limits import Busy
from ckpt.service.roots import Roots, ServedRoot
from ckpt.service.rows import step_detail, step_row, version_detail, version_row
from ckpt.timeline import SaveRecord
from ckpt.versions import find_version
from ckpt.wire import StepDetail, VersionDetail, VersionList

from . import tensors
from .heats import Heats
from .norms import NormTable, adapter_distance, adapter_norms
from .plots import plots, throughput
from .render import page
from .timeline import Timeline, TimelineReader, grouped

VERSIONS: Final = 50
GLANCE_S: Final = 5.0
"""How long the list of runs waits for a root."""
WAIT_S: Final = 4.0
"""How long a request for a heat map waits for it, before it says how far it is."""
_QUERY: Final = 200

P = ParamSpec("P")
Text = Annotated[str | None, Query(max_length=_QUERY)]

router = APIRouter(include_in_schema=False, dependencies=[Depends(Needs(Scope.read))])


class Pages:
    """What the pages keep between requests; all of it can be had from the roots again.

    Args:
        roots: of the service.
    """

    def __init__(self, roots: Roots) -> None:
        self._readers = {root.name: TimelineReader(root.storage, root.listings) for root in roots}
        self.heats = Heats()

    def close(self) -> None:
        """Give up what is being made."""
        self.heats.close()

    def timeline(self, root: ServedRoot) -> TimelineReader:
        """The timeline of a root."""
        return self._readers[root.name]


def shown(view: Callable[P, Awaitable[Response]]) -> Callable[P, Awaitable[Response]]:
    """Make a view's errors pages as well."""

    @functools.wraps(view)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> Response:
        request: Any = kwargs["request"]
        try:
            return await view(*args, **kwargs)
        except HTTPException as error:
            status, message = error.status_code, str(error.detail)
        except CkptError as error:
            status, message = status_of(error), str(error)
        except Busy as error:
            status, message = 503, str(error)
        except TimeoutError:
            status, message = 503, "the store does not answer in time"
        part = "part.html" if request.url.path.endswith("/norms") else "error.html"
        return page(request, part, {"status": status, "problem": message}, status=status)

    return answer


def _root(request: Request, run: str) -> ServedRoot:
    roots: Roots = request.app.state.roots
    return roots.named(run)


@router.get("/")
@shown
async def show_runs(request: Request) -> Response:
    """The roots that are served."""
    roots: Roots = request.app.state.roots
    cards = await asyncio.gather(*(_card(request, root) for root in roots))
    return page(request, "runs.html", {"cards": cards})


async def _card(request: Request, root: ServedRoot) -> dict[str, Any]:
    """A root at a glance; one that does not answer says so, and holds nobody up."""
    pages: Pages = request.app.state.pages
    try:
        async with asyncio.timeout(GLANCE_S):
            timeline = await root.call(pages.timeline(root).page, None)
            latest = await _latest(root)
    except CkptError as error:
        return {"root": root, "problem": str(error)}
    except TimeoutError:
        return {"root": root, "problem": "the store does not answer in time"}
    known = {"timeline": timeline, "latest": latest, "facts": facts(timeline)}
    return {"root": root, "problem": None, **known}


@router.get("/runs/{run}")
@shown
async def show_timeline(request: Request, run: str, before: Text = None) -> Response:
    """A run's steps and what they cost."""
    root = _root(request, run)
    pages: Pages = request.app.state.pages
    timeline = await root.call(pages.timeline(root).page, before)
    latest = {} if before else await _latest(root)
    values = {
        "root": root,
        "tab": "timeline",
        "timeline": timeline,
        "plots": plots(timeline.records),
        "facts": facts(timeline),
        "rows": grouped(timeline.entries),
        "latest": latest,
        "before": before,
    }
    return page(request, "timeline.html", values)


async def _latest(root: ServedRoot) -> dict[str, Any]:
    await root.watcher.refresh()
    return {name: version_row(entry) for name, entry in root.watcher.newest_of_all().items()}


@dataclass(frozen=True, slots=True)
class Facts:
    """The numbers at the head of a timeline; None where nothing tells.

    Attributes:
        stall: median, in ms.
        total: median from call to end, in ms.
        rate: median throughput, in bytes a second.
        saves: how many records these are of.
        trouble: how many steps or saves of the page are damaged or failed.
        skipped: how many were left out.
        flying: how many are in flight.
    """

    stall: float | None
    total: float | None
    rate: float | None
    saves: int
    trouble: int
    skipped: int
    flying: int


def facts(timeline: Timeline) -> Facts:
    """What a page of a timeline comes to."""
    ran = [record for record in timeline.records if record.outcome != "skipped"]
    states = [entry.state for entry in timeline.entries]
    failed = sum(record.outcome == "failed" for record in timeline.records)
    return Facts(
        stall=_median([_of(record, "stall_ms") for record in ran]),
        total=_median([_of(record, "total_ms") for record in ran]),
        rate=_median([throughput(record) for record in ran]),
        saves=len(ran),
        trouble=states.count("damaged") + failed,
        skipped=sum(record.outcome == "skipped" for record in timeline.records),
        flying=states.count("flying"),
    )


def _of(record: SaveRecord, name: str) -> float | None:
    return record.numbers.get(name)


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


@router.get("/runs/{run}/steps/{step}")
@shown
async def show_step(
    request: Request, run: str, step: str, find: Text = None, page_number: Text = None
) -> Response:
    """A step down to tensors, shards and placements."""
    pair = parse_step_dir(step)
    if pair is None:
        raise HTTPException(404, "steps are named like step-00000042.w0003")
    root = _root(request, run)
    detail = await root.call(_step, root, *pair)
    wanted = (find or "").strip().lower()
    rows = [row for row in detail.tensors if wanted in row.name.lower()]
    rows.sort(key=lambda row: tensors.natural(row.name))
    pages = max(1, -(-len(rows) // tensors.PAGE))
    asked = page_number or "1"
    number = min(pages, max(1, int(asked))) if asked.isascii() and asked.isdigit() else 1
    begin = tensors.PAGE * (number - 1)
    values = {
        "root": root,
        "tab": "timeline",
        "detail": detail,
        "meshes": tensors.meshes(detail.mesh),
        "name": step,
        "shards": tensors.shard_views(detail.files, detail.tensors),
        "rows": [tensors.tensor_view(row) for row in rows[begin : begin + tensors.PAGE]],
        "found": len(rows),
        "find": find or "",
        "number": number,
        "pages": pages,
    }
    return page(request, "step.html", values)


def _step(root: ServedRoot, step: int, epoch: int) -> StepDetail:
    entry = find_step(root.storage, step, epoch=epoch)
    if entry.manifest is None:
        raise NoCheckpoint(f"step {step} has no manifest: {entry.problem}")
    return step_detail(step_row(entry), entry.manifest)


@router.get("/runs/{run}/versions")
@shown
async def show_versions(request: Request, run: str, before: Text = None) -> Response:
    """Published versions, and which replica serves which."""
    root = _root(request, run)
    versions, replicas, leases = await root.call(_serving, root, before)
    values = {
        "root": root,
        "tab": "versions",
        "versions": versions,
        "before": before,
        "replicas": replicas,
        "leases": leases,
        "served": _served(replicas),
    }
    return page(request, "versions.html", values)


def _serving(
    root: ServedRoot, before: str | None
) -> tuple[VersionList, list[ReplicaRecord], list[Lease]]:
    versions = root.listings.versions(None, before, VERSIONS)
    return versions, read_replicas(root.storage), live_leases(list_leases(root.storage))


def _served(replicas: Sequence[ReplicaRecord]) -> dict[str, int]:
    """How many engines serve each version, as their sidecars said last."""
    served: dict[str, int] = {}
    for record in replicas:
        for engine in () if record.stopped or record.stale() else record.engines:
            if engine.live is not None and engine.up:
                served[engine.live] = served.get(engine.live, 0) + 1
    return served


@router.get("/runs/{run}/versions/{name}")
@shown
async def show_version(request: Request, run: str, name: str, against: Text = None) -> Response:
    """One version: what it is, who uses it, and its heat maps."""
    root = _root(request, run)
    detail = await root.call(_version, root, name)
    versions, replicas, leases = await root.call(_serving, root, None)
    others = [row.name for row in versions.versions if row.state == "committed"]
    older = [other for other in others if other < name]
    values = {
        "root": root,
        "tab": "versions",
        "detail": detail,
        "leases": [lease for lease in leases if lease.version == name],
        "engines": [
            (record, engine)
            for record in replicas
            for engine in record.engines
            if engine.live == name
        ],
        "others": [other for other in others if other != name],
        "against": against if against in others else (older[0] if older else None),
    }
    return page(request, "version.html", values)


def _version(root: ServedRoot, name: str) -> VersionDetail:
    manifest = _manifest(root, name)
    return version_detail(version_row(find_version(root.storage, name)), manifest)


def _manifest(root: ServedRoot, name: str) -> VersionManifest:
    if parse_version_name(name) is None:
        raise NoCheckpoint("versions are named like run7-v00000042")
    root.registry.get(name)  # says why it cannot be had
    manifest = find_version(root.storage, name).manifest
    if manifest is None:
        raise NoCheckpoint(f"{name} was deleted at this moment")
    return manifest


@router.get("/runs/{run}/versions/{name}/norms")
@shown
async def show_norms(request: Request, run: str, name: str, against: Text = None) -> Response:
    """A heat map: the norm of every module's update, or of its difference to another version."""
    root = _root(request, run)
    pages: Pages = request.app.state.pages
    one = await root.call(_manifest, root, name)
    other = None if against is None else await root.call(_manifest, root, against)
    if other is not None and other.name == one.name:
        raise ConfigError("a version does not differ from itself; choose another one")
    key = [root.name, one.adapter_sha256, *([] if other is None else [other.adapter_sha256])]

    def make(tick: Callable[[float], None]) -> NormTable:
        if other is None:
            return adapter_norms(root.storage, one, tick)
        return adapter_distance(root.storage, one, other, tick)

    deadline = asyncio.get_running_loop().time() + WAIT_S
    while True:
        found = pages.heats.ask(tuple(key), make)
        if isinstance(found, NormTable) or asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.05)
    done = isinstance(found, NormTable)
    inner = "norms.html" if done else "norms_wait.html"
    # A browser without script opens this as a page of its own.
    alone = request.headers.get("sec-fetch-dest") == "document"
    values = {"root": root, "name": name, "against": against, "inner": inner}
    values |= {"table": found} if done else {"share": found}
    template = "norms_page.html" if alone else inner
    return page(request, template, values, status=200 if done else 202)
