"""Operations for those who keep the service running."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from ckpt.wire import API, Health

from . import metrics
from .auth import Needs, Scope

router = APIRouter(tags=["health"])


@router.get("/healthz")
async def healthz() -> Health:
    """Whether the process works."""
    return Health(True)


@router.get("/readyz", responses={503: {"model": Health, "description": "A root does not answer."}})
async def readyz(request: Request, response: Response) -> Health:
    """Whether every root answers; which do not is said to those alone who may read."""
    if request.app.state.stopping:
        response.status_code = 503
        return Health(False, {"service": "stopping"})
    problems = await request.app.state.roots.problems()
    if problems:
        response.status_code = 503
    known = getattr(request.state, "principal", None) is not None
    return Health(not problems, problems if known else {})


@router.get(
    "/metrics",
    dependencies=[Depends(Needs(Scope.read))],
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def show_metrics(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    return Response(request.app.state.metrics.text(), media_type=metrics.CONTENT_TYPE)


@router.get(
    f"{API}/openapi.json", dependencies=[Depends(Needs(Scope.read))], include_in_schema=False
)
async def show_openapi(request: Request) -> JSONResponse:
    """The description of the API, made from its operations."""
    return JSONResponse(request.app.openapi())
