"""Operations about what is new: the newest version, long polls, server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter

from ckpt.errors import ConfigError, NoCheckpoint
from ckpt.layout import MAX_VERSION, parse_version_name
from ckpt.versions import VersionEntry
from ckpt.wire import API, VersionDetail, VersionRow

from .answers import RESPONSES
from .auth import Needs, Scope
from .routes_runs import NAME, Root, RunName
from .rows import version_detail, version_row
from .streams import ClosingStream
from .watch import Change

BEAT_S: Final = 15.0
"""Without news, a comment is sent so often: proxies close what is silent."""
RETRY_MS: Final = 1000

router = APIRouter(
    prefix=API, tags=["news"], responses=RESPONSES, dependencies=[Depends(Needs(Scope.read))]
)


def _floor(newer_than: str | None, run_name: str | None) -> tuple[str | None, int]:
    """Run and number that a caller has already; a name says both."""
    if newer_than is None:
        return run_name, -1
    if newer_than.isdecimal():
        number = int(newer_than)
        if number > MAX_VERSION:
            raise ConfigError(f"newer_than is at most {MAX_VERSION}")
        return run_name, number
    pair = parse_version_name(newer_than)
    if pair is None or run_name not in (None, pair[0]):
        raise ConfigError("newer_than takes the number, or the name, of a version of the run")
    return pair


NewerThan = Annotated[
    str | None,
    Query(pattern=NAME, description="Number or name of the version that the caller has."),
]


@router.get("/runs/{run}/latest", response_model=VersionDetail)
async def show_latest(
    request: Request,
    root: Root,
    run_name: RunName = None,
    if_none_match: Annotated[str | None, Header(max_length=1000)] = None,
) -> Response:
    """The newest whole version. What was committed before the request is always seen."""
    entry = await root.watcher.latest(run_name)
    if entry is None:
        raise NoCheckpoint(f"no version in {root.url} yet")
    return _answer(entry, if_none_match)


@router.get(
    "/runs/{run}/wait",
    response_model=VersionDetail,
    responses={204: {"description": "No newer version in time.", "model": None}},
)
async def wait_for_version(
    request: Request,
    root: Root,
    newer_than: NewerThan = None,
    run_name: RunName = None,
    timeout_s: Annotated[
        float, Query(ge=0, le=3600, description="Cut to the service's bound.")
    ] = 30.0,
) -> Response:
    """The newest version above another, as soon as there is one: a long poll."""
    request.scope["ckpt_waits"] = True
    run, floor = _floor(newer_than, run_name)
    bound = request.app.state.config.limits.wait_s
    with request.app.state.waiting.one():
        waiting = root.watcher.wait(run, floor, min(timeout_s, bound))
        entry = await _while_there(request, waiting)
    return Response(status_code=204) if entry is None else _answer(entry, None)


async def _while_there(
    request: Request, waiting: Coroutine[Any, Any, VersionEntry | None]
) -> VersionEntry | None:
    """What is waited for, or None as soon as the caller has gone: its place is free again."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(waiting), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return await tasks[0] if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


def _answer(entry: VersionEntry, if_none_match: str | None) -> Response:
    etag = f'"{entry.name}"'
    if if_none_match is not None and etag in if_none_match.split(", "):
        return Response(status_code=304, headers={"ETag": etag})
    return Response(_encoded(entry), media_type="application/json", headers={"ETag": etag})


_DETAIL: Final = TypeAdapter(VersionDetail)
_ROW: Final = TypeAdapter(VersionRow)


def _encoded(entry: VersionEntry) -> bytes:
    if entry.manifest is None:
        raise NoCheckpoint(f"{entry.name} was not committed")
    return _DETAIL.dump_json(version_detail(version_row(entry), entry.manifest))


@router.get(
    "/runs/{run}/events",
    response_class=StreamingResponse,
    responses={
        200: {
            "description": "Events `version` (data: as in a listing) and, if asked for, `step`.",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        }
    },
)
async def stream_events(
    request: Request,
    root: Root,
    newer_than: NewerThan = None,
    run_name: RunName = None,
    steps: Annotated[bool, Query(description="Also tell about steps.")] = False,
    last_event_id: Annotated[str | None, Header(pattern=NAME)] = None,
) -> StreamingResponse:
    """Server-sent events about what is new, until the caller goes away or the service stops.

    A version's event has its name as id, so that a caller which connects again hears of what it
    missed, as far as it is among the last 256.
    """
    request.scope["ckpt_waits"] = True
    given = last_event_id or newer_than
    run, floor = _floor(given, run_name)
    changes = root.watcher.changes(
        run=run, floor=floor if given is not None else None, steps=steps, beat_s=BEAT_S
    )
    held = contextlib.ExitStack()
    held.enter_context(request.app.state.waiting.one())

    async def stream() -> AsyncGenerator[str, None]:
        try:
            yield f"retry: {RETRY_MS}\n\n"
            async for change in changes:
                yield ": still here\n\n" if change is None else _event(change)
            yield "event: bye\ndata: {}\n\n"
        finally:
            await changes.aclose()

    more = {"X-Accel-Buffering": "no"}
    return ClosingStream(stream(), 200, more, "text/event-stream", held)


def _event(change: Change) -> str:
    if change.entry is not None:
        data = _ROW.dump_json(version_row(change.entry)).decode()
        return f"event: version\nid: {change.name}\ndata: {data}\n\n"
    step, epoch = change.step or (-1, -1)
    data = json.dumps({"name": change.name, "step": step, "epoch": epoch})
    return f"event: step\ndata: {data}\n\n"
