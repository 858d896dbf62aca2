"""Stand-in engines that a module's tests share, and a fresh root for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.handovers import World

from ckpt.handoff.drivers import open_engine

_numbers = iter(range(10_000))


@pytest.fixture(scope="module")
def servers() -> Iterator[list[FakeEngine]]:
    """One of each kind: the hand-over does not care."""
    with FakeEngine("vllm") as one, FakeEngine("sglang") as other:
        yield [one, other]


@pytest.fixture
def world(servers: list[FakeEngine], tmp_path: Path) -> Iterator[World]:
    for server in servers:  # slots are few
        engine = open_engine(server.address)
        for name in engine.adapters():
            engine.unload(name)
        engine.close()
    made = World(servers, tmp_path, f"run{next(_numbers)}")
    yield made
    made.close()
