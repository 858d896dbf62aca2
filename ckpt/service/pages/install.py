"""Puts the pages into the service."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ckpt.service.roots import Roots

from . import login, views
from .render import HERE


class OwnFiles(StaticFiles):
    """Style and script; a browser asks each time whether it still has the right ones."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """A file, kept by the browser and asked about."""
        answer = await super().get_response(path, scope)
        answer.headers["Cache-Control"] = "no-cache"
        return answer


def install_pages(app: FastAPI, roots: Roots) -> str:
    """Add the pages to an application.

    Args:
        app: the service.
        roots: its roots.

    Returns:
        Where a browser without a token is sent.
    """
    app.state.pages = views.Pages(roots)
    app.include_router(login.router)
    app.include_router(views.router)
    app.mount("/static", OwnFiles(directory=HERE / "static"), name="static")
    return "/login"
