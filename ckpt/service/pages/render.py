"""Templates, and what they may call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ckpt.about import package_version
from ckpt.service.auth import principal_of

from . import text
from .timeline import STATES

HERE: Final = Path(__file__).parent

_ENVIRONMENT: Final = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    size=text.size, span=text.span, rate=text.rate, ago=text.ago, clock=text.clock
)
_ENVIRONMENT.globals.update(STATES=STATES, version=package_version())


def page(
    request: Request, template: str, values: Mapping[str, Any], *, status: int = 200
) -> HTMLResponse:
    """A page, or a part of one."""
    gate = request.app.state.gate
    who = principal_of(request)
    context = {"path": request.url.path, "who": who, "closed": not gate.open, **values}
    body = _ENVIRONMENT.get_template(template).render(context)
    return HTMLResponse(body, status, headers={"Vary": "Cookie"})
