"""Answers that go on: what makes them is closed as soon as they end, however they do."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import ExitStack

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send


class ClosingStream(StreamingResponse):
    """A streamed answer whose generator gives back at once what it holds.

    Starlette leaves a generator that was cut short to the garbage collector, which may take its
    time; until then, a place among the downloads or listeners would stay taken.

    Args:
        pieces: the body.
        status: of HTTP.
        headers: more headers.
        kind: the media type.
        held: closed in the end, also if the body was never begun.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None] | AsyncGenerator[str, None],
        status: int,
        headers: Mapping[str, str],
        kind: str,
        held: ExitStack,
    ) -> None:
        super().__init__(pieces, status, headers, media_type=kind)
        self._pieces, self._held = pieces, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        with self._held:
            try:
                await super().__call__(scope, receive, send)
            finally:
                await self._pieces.aclose()
