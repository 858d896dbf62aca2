"""The application: operations, their errors, and what every request passes first."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Final

from fastapi import FastAPI

from ckpt.about import package_version
from ckpt.errors import ConfigError

from . import (
    answers,
    routes_files,
    routes_health,
    routes_holds,
    routes_jobs,
    routes_news,
    routes_runs,
)
from .auth import Gate, undeclared
from .config import ServiceConfig
from .front import Front
from .limits import Slots
from .metrics import ServiceMetrics
from .pages.install import install_pages
from .roots import Roots

ROUTERS: Final = (
    routes_health.router,
    routes_runs.router,
    routes_news.router,
    routes_files.router,
    routes_holds.router,
    routes_jobs.router,
)
"""The operations, part by part."""


def create_app(config: ServiceConfig) -> FastAPI:
    """The ASGI application of a service.

    On its ``state`` lie ``config``, ``roots``, ``gate``, ``metrics``, ``waiting``, ``downloads``,
    ``stopping`` and ``begin_stop``, which lets those go who wait.

    Args:
        config: roots, tokens and bounds.

    Raises:
        ConfigError: a root that cannot be opened, or an operation that says not who may use it.
    """
    metrics = ServiceMetrics()
    roots = Roots(config, metrics)
    gate = Gate(config.tokens, config.allowed_hosts)

    async def begin_stop() -> None:
        app.state.stopping = True
        await roots.stop_waiting()

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        roots.start()
        try:
            yield
        finally:
            await begin_stop()
            app.state.pages.close()
            await roots.close()

    app = FastAPI(
        title="ckpt",
        summary="Runs, steps, published versions and jobs of checkpoint roots.",
        version=package_version(),
        openapi_url=None,  # ours asks for a token
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.config = config
    app.state.roots = roots
    app.state.metrics = metrics
    app.state.waiting = Slots("long polls and event streams", config.limits.waiting)
    app.state.downloads = Slots("downloads", config.limits.downloads)
    app.state.gate = gate
    app.state.stopping = False
    app.state.begin_stop = begin_stop
    answers.install(app)
    for router in ROUTERS:
        app.include_router(router)
    login_path = install_pages(app, roots)
    open_doors = undeclared(app)
    if open_doors:
        msg = f"operations that do not say which scope they need: {', '.join(open_doors)}"
        raise ConfigError(msg)
    app.add_middleware(
        Front,
        gate=gate,
        limits=config.limits,
        metrics=metrics,
        login_path=login_path,
    )
    return app
