"""Two replicas, a root with versions and a cache of them: what a hand-over's tests need."""

from __future__ import annotations

from pathlib import Path

from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import Engine
from ckpt.handoff.handover import Handover
from ckpt.handoff.registry import Registry, Version
from support.fake_engine import FakeEngine
from support.probed_versions import publish_for

HOLDER = "tests"


class World:
    """Two replicas, a root with versions, and a cache of them."""

    def __init__(self, servers: list[FakeEngine], directory: Path, run: str) -> None:
        self.servers, self.run = servers, run
        self.registry = Registry(directory / "root")
        self.cache = directory / "cache"
        self.engines: list[Engine] = [open_engine(one.address, timeout_s=5.0) for one in servers]
        self.count = 0

    def version(self, *, probe: bool = True, zero: bool = False) -> tuple[Version, Path]:
        self.count += 1
        version = publish_for(
            self.registry.storage,
            self.run,
            self.count,
            self.servers[0] if probe else None,
            zero=zero,
        )
        return version, self.registry.fetch(version, self.cache)

    def handover(self, **options: object) -> Handover:
        options = {"holder": HOLDER, "retry_pause_s": 0.01, **options}
        return Handover(self.engines, registry=self.registry, **options)

    def close(self) -> None:
        for engine, server in zip(self.engines, self.servers, strict=True):
            engine.close()
            if server.alive:
                server.faults()
            else:
                server.restart()


def lists(world: World) -> list[list[str]]:
    return [sorted(engine.adapters()) for engine in world.engines]


def loads_of(server: FakeEngine, name: str) -> int:
    return sum(
        item["body"].get("lora_name") == name and item["path"].endswith("/load_lora_adapter")
        for item in server.requests()
    )
