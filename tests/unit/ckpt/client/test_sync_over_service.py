"""``ckpt sync`` over a service: as over a root, also when the service goes and comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.memory_engine import MemoryEngine
from support.published import publish_one
from support.serving import LEASE, READ, serving, tokens

from ckpt.handoff.cache import VersionCache
from ckpt.handoff.registry import Registry
from ckpt.handoff.replica_poster import ReplicaPoster
from ckpt.handoff.replica_record import read_replicas
from ckpt.handoff.sync import Sidecar, SyncConfig
from ckpt.holds import list_leases
from ckpt.storage import open_storage


def until(true: Callable[[], bool], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_sidecar_follows_a_root_over_a_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.handoff.sync_watch.ANNOUNCED_S", 0.3)
    root, known = tmp_path / "lab", tokens(tmp_path)
    publish_one(root, seed=0)
    engine, stop = MemoryEngine(), threading.Event()

    def live() -> str | None:
        found: str | None = sidecar.status.readiness()[1]["version"]
        return found

    with serving(root, tokens=known) as first:
        url = str(first.base_url).rstrip("/")
        registry = Registry(
            f"{url}/runs/lab", run="run7", storage_options={"token": LEASE, "timeout_s": 2.0}
        )
        cache = VersionCache(tmp_path / "cache", max_bytes=10**9)
        config = SyncConfig(run="run7", holder="far", check_s=0.2)
        sidecar = Sidecar(registry, [engine], cache, config)
        thread = threading.Thread(target=sidecar.run, args=(stop,), daemon=True)
        thread.start()
        poster = ReplicaPoster(
            registry.storage, sidecar.status, run="run7", holder="far", look_s=0.05
        )
        poster.start()
        until(lambda: live() == "run7-v00000001")
        publish_one(root, seed=1)
        until(lambda: live() == "run7-v00000002")
        held = {lease.version: lease.holder for lease in list_leases(open_storage(root))}
        assert held["run7-v00000002"] == "far"
        until(lambda: any(r.current for r in read_replicas(open_storage(root))))
    publish_one(root, seed=2)  # while no service answers, the engine goes on with what it has
    assert live() == "run7-v00000002"
    with serving(root, tokens=known, port=int(url.rpartition(":")[2])):
        until(lambda: live() == "run7-v00000003")
        poster.stop()
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    cache.close()
    registry.close()


def test_a_sidecar_needs_the_scope_lease(tmp_path: Path) -> None:
    publish_one(tmp_path / "lab")
    with serving(tmp_path / "lab", tokens=tokens(tmp_path)) as client:
        registry = Registry(str(client.base_url), storage_options={"token": READ})
        with pytest.raises(OSError, match="scope 'lease'"):
            registry.lease(1, "me", 60)
        registry.close()
