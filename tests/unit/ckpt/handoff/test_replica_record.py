"""What a sidecar leaves in the root about its engines: written on change, bounded, only a hint."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.memory_engine import MemoryEngine
from support.published import publish_one
from support.sidecar import until

from ckpt.envelope import seal, unseal, utc_now
from ckpt.errors import DamagedError, StorageError
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.handover import Handover
from ckpt.handoff.registry import Registry
from ckpt.handoff.replica_poster import FORGET_S, HandoverBoard, ReplicaPoster
from ckpt.handoff.replica_record import (
    REPLICAS_FORMAT,
    EngineRecord,
    ReplicaRecord,
    read_replicas,
)
from ckpt.handoff.sync import Sidecar, SyncConfig
from ckpt.handoff.sync_status import SyncStatus
from ckpt.layout import REPLICAS, replica_path
from ckpt.storage import open_storage

ENGINE = EngineRecord("http://a:1", True, "run7-v00000001", "expected", utc_now(), None)


def record(**changes: Any) -> ReplicaRecord:
    values: dict[str, Any] = {
        "holder": "me",
        "run": "run7",
        "host": "h",
        "at": utc_now(),
        "every_s": 60.0,
        "stopped": False,
        "current": "run7-v00000001",
        "newest": 1,
        "engines": (ENGINE,),
        "passed_over": (("run7-v00000002", "damaged"),),
    }
    return ReplicaRecord(**(values | changes))


def test_a_sidecar_tells_which_engine_proved_what(tmp_path: Path) -> None:
    root = tmp_path / "root"
    publish_one(root)
    engine = MemoryEngine()
    registry = Registry(root, run="run7")
    cache = VersionCache(tmp_path / "cache", root="here", grace_s=0.0)
    sidecar = Sidecar(registry, [engine], cache, SyncConfig(run="run7", holder="me"))
    storage = registry.storage
    poster = ReplicaPoster(storage, sidecar.status, run="run7", holder="me", look_s=0.02)
    poster.start()
    until(lambda: read_replicas(storage))
    (before,) = read_replicas(storage)
    assert (before.current, before.engines[0].live) == (None, None)
    sidecar._watcher.look()
    sidecar.step()
    until(lambda: read_replicas(storage)[0].current == "run7-v00000001")
    (after,) = read_replicas(storage)
    (told,) = after.engines
    assert (told.url, told.up, told.live, told.problem) == (engine.url, True, after.current, None)
    assert told.proof in {"expected", "difference"}
    assert told.proved is not None
    assert (after.newest, after.stopped, after.stale()) == (1, False, False)
    poster.stop()
    assert read_replicas(storage)[0].stopped
    cache.close()


def test_a_handover_in_a_trainer_tells_it_too(tmp_path: Path) -> None:
    root = tmp_path / "root"
    publish_one(root)
    engines = [MemoryEngine("http://a"), MemoryEngine("http://b")]
    registry = Registry(root, run="run7")
    urls = [engine.url for engine in engines]
    board = HandoverBoard(registry.storage, run="run7", holder="trainer", engines=urls, look_s=0.02)
    handover = Handover(engines, holder="trainer", retries=0, quorum=1, on_report=board)
    for number in (1, 2):
        version = registry.latest()
        assert version is not None
        engines[1].away = number == 2
        handover.make_live(version, registry.fetch(version, tmp_path / "cache"))
        until(
            lambda name=version.name: [
                r for r in read_replicas(registry.storage) if r.current == name
            ]
        )
        publish_one(root, seed=number)
    (told,) = read_replicas(registry.storage)
    first, second = told.engines
    assert (first.live, first.up, first.problem) == ("run7-v00000002", True, None)
    assert first.proof in {"expected", "difference"}
    assert second.live is None
    assert second.problem is not None
    board.stop()
    assert read_replicas(registry.storage)[0].stopped


class Counting:
    has_rename = True
    url = "x"

    def __init__(self) -> None:
        self.puts: list[bytes] = []
        self.fail = False

    def put(self, path: str, data: bytes) -> None:
        if self.fail:
            raise StorageError("away")
        self.puts.append(data)

    def list(self, path: str) -> list[Any]:
        return []

    def local_path(self, path: str) -> Path:
        return Path(__file__).parent  # a directory that is there


def test_only_a_change_is_written_and_a_store_that_fails_is_asked_again(caplog: Any) -> None:
    storage = Counting()
    status = SyncStatus("run7", "me", ["http://a:1"])
    poster = ReplicaPoster(storage, status, run="run7", holder="me", look_s=0.01)
    poster.start()
    until(lambda: storage.puts)
    time.sleep(0.1)
    assert len(storage.puts) == 1
    storage.fail = True
    status.replica("http://a:1", up=True)
    until(lambda: "cannot tell the root" in caplog.text)
    time.sleep(0.05)
    storage.fail = False
    until(lambda: len(storage.puts) == 2)
    poster.stop()
    assert ReplicaRecord.from_bytes(storage.puts[-1], "x").stopped
    assert caplog.text.count("cannot tell the root") == 1


def test_nobody_makes_a_root_that_is_not_there_by_reporting_to_it(tmp_path: Path) -> None:
    root = tmp_path / "mistyped"
    storage = open_storage(str(root))
    status = SyncStatus("run7", "me", ["http://a:1"])
    poster = ReplicaPoster(storage, status, run="run7", holder="me", look_s=0.01)
    poster.start()
    time.sleep(0.1)
    assert not root.exists()
    root.mkdir()  # the trainer has come
    until(lambda: read_replicas(storage))
    poster.stop()


def test_records_of_the_long_gone_are_deleted(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    old = (datetime.now(UTC) - timedelta(seconds=FORGET_S + 60)).isoformat()
    for holder, at, run in (("gone", old, "run7"), ("new", utc_now(), "run7"), ("of", old, "x")):
        body = record(holder=holder, at=at, run=run).to_bytes()
        storage.put(replica_path(holder), body)
    status = SyncStatus("run7", "me", [])
    poster = ReplicaPoster(storage, status, run="run7", holder="me", look_s=0.01)
    poster.start()
    poster.stop()
    assert [one.holder for one in read_replicas(storage)] == ["me", "new", "of"]


def test_credentials_of_an_address_do_not_get_there() -> None:
    engine = replace(ENGINE, url="http://user:secret@a:1/v1?key=secret")
    data = record(engines=(engine,)).to_bytes()
    assert b"secret" not in data
    assert ReplicaRecord.from_bytes(data, "x").engines[0].url == "http://a:1/v1"


def test_what_is_no_record_is_passed_over(tmp_path: Path, caplog: Any) -> None:
    storage = open_storage(tmp_path)
    storage.put(replica_path("a"), b"{}")
    storage.put(replica_path("b"), record(holder="other").to_bytes())
    storage.put(f"{REPLICAS}/x y.json", record().to_bytes())
    storage.put(replica_path("me"), record().to_bytes())
    assert [one.holder for one in read_replicas(storage)] == ["me"]
    assert caplog.text.count("passed over") == 2


@pytest.mark.parametrize(
    "change",
    [
        {"engines": [{}]},
        {"engines": [{}] * 65},
        {"every_s": 0.0},
        {"every_s": 1},
        {"current": "<script>"},
        {"stopped": "no"},
        {"newest": -1},
        {"at": "now"},
        {"passed_over": [{"version": "../x", "reason": ""}]},
        {"more": 1},
    ],
)
def test_a_record_that_breaks_a_bound_is_refused(change: dict[str, Any]) -> None:
    good = record()
    assert ReplicaRecord.from_bytes(good.to_bytes(), "x") == good
    body = unseal(good.to_bytes(), REPLICAS_FORMAT, 1, "x")
    with pytest.raises(DamagedError):
        ReplicaRecord.from_bytes(seal(REPLICAS_FORMAT, 1, body | change), "x")
