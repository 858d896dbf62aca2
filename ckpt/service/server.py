"""The process: sockets, deadlines for the heads of requests, logs, and the end."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from datetime import UTC, datetime
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .app import create_app
from .config import ServiceConfig


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record with its time in UTC and, of a request, the facts."""
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "at": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        facts = getattr(record, "request", None)
        if facts is not None:
            line["request"] = facts
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send every log record to standard error as a JSON line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for name in ("ckpt", "uvicorn.error"):
        logging.getLogger(name).setLevel(level)


class PunctualProtocol(H11Protocol):
    """HTTP/1.1 whose callers must send the head of a request within a time.

    Uvicorn bounds how long a connection may be idle, not how long a head may take: a caller that
    sends a byte now and then would hold a connection for ever.
    """

    head_s: float = 10.0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to count."""
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        """Stop counting once the head is there; begin anew with the next one."""
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            if self._head_timer is None and self.conn.trailing_data[0]:
                self._expect_head()
        else:
            self._stop_counting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting."""
        self._stop_counting()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_s, self._too_slow)

    def _stop_counting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.abort()


class _Server(uvicorn.Server):
    """Uvicorn's, whose end begins with telling those who wait."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let long polls and event streams end, then everything else."""
        await self.config.app.state.begin_stop()  # type: ignore[union-attr]  # our own application
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            # Its time is over, and what it did not take would hold it open for ever.
            connection.transport.abort()
        await asyncio.sleep(0)  # in which the loop closes them


class Service:
    """A service in this process.

    Args:
        config: roots, address, tokens and bounds.

    Raises:
        ConfigError: as :func:`~ckpt.service.app.create_app`.
    """

    def __init__(self, config: ServiceConfig) -> None:
        self._config = config
        self.app = create_app(config)
        protocol = type("Protocol", (PunctualProtocol,), {"head_s": config.limits.head_s})
        self._server = _Server(
            uvicorn.Config(
                self.app,
                host=config.host,
                port=config.port,
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                proxy_headers=False,
                limit_concurrency=config.limits.connections,
                backlog=min(2048, config.limits.connections),
                timeout_keep_alive=max(1, round(config.limits.head_s)),
                timeout_graceful_shutdown=max(1, round(config.drain_s)),
                h11_max_incomplete_event_size=config.limits.head_bytes,
            )
        )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Host and port of the sockets, once it serves."""
        sockets = [s for server in self._server.servers for s in server.sockets]
        return [(str(name[0]), int(name[1])) for name in (s.getsockname() for s in sockets)]

    @property
    def started(self) -> bool:
        """Whether it listens."""
        return self._server.started

    def stop(self) -> None:
        """Ask it to end, from any thread; :meth:`run` returns once it has."""
        self._server.should_exit = True

    def run(self) -> bool:
        """Serve until a SIGTERM or SIGINT; callers then get their time to end.

        Returns:
            Whether it could listen at all.
        """
        try:
            self._server.run()
        except SystemExit:  # uvicorn's way to say that the address is taken
            return False
        return self._server.started
