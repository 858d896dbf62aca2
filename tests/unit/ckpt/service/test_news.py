"""News: the newest version at one cost, long polls, events, and one watcher for all of them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.published import damage, publish_one
from support.serving import serving
from support.steps import tiny_adapter, write_step

from ckpt.errors import StorageError
from ckpt.handoff import Registry
from ckpt.handoff.newest import NewestVersions
from ckpt.layout import claim_path, version_dir
from ckpt.service.metrics import ServiceMetrics
from ckpt.service.watch import RootWatcher
from ckpt.storage import Storage, open_storage
from ckpt.storage.posix import PosixStorage
from ckpt.versions import delete_version


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def many(root: Path, count: int) -> None:
    """A root with one whole version, and names of older ones and of steps around it."""
    name = publish_one(root)
    top = root / "adapters"
    (top / name).rename(top / f"run7-v{count:08d}")
    manifest = top / f"run7-v{count:08d}" / "MANIFEST.json"
    _renumber(manifest, count)
    for number in range(1, count + 1):
        (top / f"run7-v{number:08d}.claim.json").touch()
        (top / f"run7-v{number:08d}").mkdir(exist_ok=True)
    for step in range(count):
        (root / "steps" / f"step-{step:08d}.w0001").mkdir(parents=True)


def _renumber(manifest: Path, number: int) -> None:
    from dataclasses import replace

    from ckpt.manifest import VersionManifest

    found = VersionManifest.from_bytes(manifest.read_bytes(), "m")
    made = replace(found, number=number, name=f"run7-v{number:08d}")
    manifest.write_bytes(made.to_bytes())


class Counted:
    """A store that counts what it is asked."""

    def __init__(self, store: Storage) -> None:
        self._store, self.calls = store, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)
        if not callable(found):
            return found

        def call(*args: Any, **more: Any) -> Any:
            self.calls += 1
            return found(*args, **more)

        return call


def test_a_look_costs_the_same_for_ten_and_for_thousands(tmp_path: Path) -> None:
    costs = []
    for count in (10, 1000):
        root = tmp_path / str(count)
        many(root, count)
        store = Counted(PosixStorage(root))
        found = NewestVersions(store)  # type: ignore[arg-type]
        assert found.look()["run7"].newest.number == count
        before = store.calls
        assert found.look()["run7"].newest.number == count
        quiet = store.calls - before
        publish_one(root)
        before = store.calls
        assert found.look()["run7"].newest.number == count + 1
        costs.append((quiet, store.calls - before))
    assert costs[0] == costs[1]
    assert costs[0][0] <= 4


def test_what_is_claimed_and_not_whole_is_passed_over(tmp_path: Path) -> None:
    clock = Clock()
    publish_one(tmp_path)
    store = open_storage(tmp_path)
    newest = NewestVersions(store, clock)
    assert newest.look()["run7"].newest.number == 1
    store.put(claim_path("run7", 2), b"of a writer that died")
    assert newest.look()["run7"].newest.number == 1
    publish_one(tmp_path, seed=3)  # gets number 3
    assert newest.look()["run7"].newest.number == 3
    damage(tmp_path, publish_one(tmp_path, seed=4))
    (tmp_path / version_dir("run7", 4) / "adapter_config.json").unlink()
    assert newest.look()["run7"].newest.number == 3  # a file is missing
    seen = newest.look()
    assert newest.look() is seen


def test_numbers_without_claims_and_behind_gaps_are_found(tmp_path: Path) -> None:
    clock = Clock()
    publish_one(tmp_path)
    store = open_storage(tmp_path)
    newest = NewestVersions(store, clock)
    newest.look()
    publish_one(tmp_path, seed=1)
    store.delete(claim_path("run7", 2))  # as a mirror brings them
    assert newest.look()["run7"].newest.number == 2
    for seed in (2, 3, 4):
        publish_one(tmp_path, seed=seed)
    for number in (3, 4):
        store.delete(claim_path("run7", number))
        store.delete_tree(version_dir("run7", number))
    assert newest.look()["run7"].newest.number == 2
    clock.now += 6
    assert newest.look()["run7"].newest.number == 5


def test_other_runs_and_deleted_versions(tmp_path: Path) -> None:
    clock = Clock()
    store = open_storage(tmp_path)
    newest = NewestVersions(store, clock)
    assert newest.look() == {}
    publish_one(tmp_path)
    assert list(newest.look()) == ["run7"]  # an empty root is listed each time
    publish_one(tmp_path, "other")
    assert list(newest.look()) == ["run7"]
    assert list(newest.look("other")) == ["other", "run7"]  # asked for by name
    publish_one(tmp_path, seed=1)
    assert newest.look()["run7"].newest.number == 2
    assert delete_version(store, "run7-v00000002") is None
    assert newest.look()["run7"].newest.number == 1
    assert newest.look()["run7"].newest.number == 1


def test_a_listing_in_another_thread_takes_nothing_back(tmp_path: Path) -> None:
    clock, asked = Clock(), []
    store = open_storage(tmp_path)
    publish_one(tmp_path)

    def submit(function: Any) -> Future[Any]:
        future: Future[Any] = Future()
        asked.append((future, function()))  # listed now, told later
        return future

    newest = NewestVersions(store, clock, submit)
    assert newest.look()["run7"].newest.number == 1
    clock.now += 6
    newest.look()
    ((future, listing),) = asked
    publish_one(tmp_path, "other")
    for seed in (1, 2):
        publish_one(tmp_path, seed=seed)
        newest.look()
    future.set_result(listing)  # older than what is known by now
    assert newest.look()["run7"].newest.number == 3
    assert [entry.number for entry in newest.look()["run7"].since(0)] == [1, 2, 3]
    clock.now += 6
    newest.look()
    asked[1][0].set_result(asked[1][1])
    assert list(newest.look()) == ["other", "run7"]


def test_latest_agrees_with_the_registry_whatever_happens(tmp_path: Path) -> None:
    import random

    rng = random.Random(7)
    store, clock = open_storage(tmp_path), Clock()
    newest, registry = NewestVersions(store, clock), Registry(store)
    for seed in range(25):
        action = rng.choice(["publish", "publish", "claim", "damage", "delete"])
        latest = registry.latest()
        if action == "publish":
            publish_one(tmp_path, seed=seed)
        elif action == "claim":
            top = max(
                (int(p.name[6:14]) for p in tmp_path.glob("adapters/*.claim.json")), default=0
            )
            store.put(claim_path("run7", top + 1), b"x")
        elif latest is not None and action == "delete":
            delete_version(store, latest.name)
        elif latest is not None:
            (tmp_path / version_dir("run7", latest.number) / "MANIFEST.json").write_bytes(b"{}")
        clock.now += rng.choice([0.0, 6.0])
        if action == "damage":
            clock.now += 6.0  # bytes that change under a name are found by the next listing
        want, found = registry.latest(), newest.look()
        assert (found["run7"].newest.name if found else None) == (want and want.name)


# --- over HTTP ----------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path: Path) -> Path:
    publish_one(tmp_path / "lab")
    return tmp_path / "lab"


@pytest.fixture
def client(root: Path) -> Iterator[httpx.Client]:
    with serving(root) as client:
        yield client


def test_what_was_committed_before_is_always_seen(client: httpx.Client, root: Path) -> None:
    for seed in range(1, 15):
        name = publish_one(root, seed=seed)
        answer = client.get("/v1/runs/lab/latest")
        assert answer.json()["summary"]["name"] == name
    tag = {"If-None-Match": answer.headers["etag"]}
    assert client.get("/v1/runs/lab/latest", headers=tag).status_code == 304
    publish_one(root, seed=99)
    assert client.get("/v1/runs/lab/latest", headers=tag).status_code == 200


def test_several_runs_have_to_be_told_apart(client: httpx.Client, root: Path) -> None:
    publish_one(root, "other")
    named = client.get("/v1/runs/lab/latest", params={"run_name": "other"})
    assert named.json()["summary"]["name"] == "other-v00000001"
    unnamed = client.get("/v1/runs/lab/latest")
    assert (unnamed.status_code, "other" in unnamed.json()["error"]["message"]) == (422, True)
    assert client.get("/v1/runs/lab/latest", params={"run_name": "none"}).status_code == 404
    mixed = client.get("/v1/runs/lab/wait?run_name=other&newer_than=run7-v00000001")
    assert mixed.status_code == 422


def test_a_long_poll(client: httpx.Client, root: Path) -> None:
    begun = time.monotonic()
    assert client.get("/v1/runs/lab/wait?newer_than=1&timeout_s=0.2").status_code == 204
    assert time.monotonic() - begun >= 0.2
    timer = threading.Timer(0.2, publish_one, (root,), {"seed": 1})
    timer.start()
    found = client.get("/v1/runs/lab/wait?newer_than=run7-v00000001&timeout_s=20")
    assert found.json()["summary"]["number"] == 2
    timer.join()
    assert client.get("/v1/runs/lab/wait").json()["summary"]["number"] == 2


@contextmanager
def events(client: httpx.Client, **params: Any) -> Iterator[Iterator[tuple[str, Any]]]:
    """(event, data) as they come."""
    headers = params.pop("headers", {})
    with client.stream("GET", "/v1/runs/lab/events", params=params, headers=headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")

        def parsed() -> Iterator[tuple[str, Any]]:
            kind = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    yield kind, json.loads(line[6:])

        yield parsed()


def test_events_of_versions_and_steps(client: httpx.Client, root: Path) -> None:
    with events(client, steps=True) as news:
        time.sleep(0.3)  # what is there already is no news
        publish_one(root, seed=1)
        kind, data = next(news)
        assert (kind, data["name"], data["step"]) == ("version", "run7-v00000002", 1)
        tensors, export = tiny_adapter()
        write_step(open_storage(root), 7, tensors, export=export)
        assert next(news) == ("step", {"name": "step-00000007.w0001", "step": 7, "epoch": 1})


def test_a_caller_that_comes_back_misses_nothing(client: httpx.Client, root: Path) -> None:
    for seed in range(1, 5):
        publish_one(root, seed=seed)
    with events(client, headers={"Last-Event-ID": "run7-v00000002"}) as news:
        assert [next(news)[1]["number"] for _ in range(3)] == [3, 4, 5]


class Asked:
    """A store that remembers when it was asked for which name, and can fail."""

    def __init__(self, root: Path) -> None:
        self._store, self.exists_calls, self.broken = PosixStorage(root), 0, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def exists(self, path: str) -> bool:
        self.exists_calls += 1
        if self.broken:
            raise StorageError("the store is down")
        return self._store.exists(path)


def test_many_who_wait_share_one_watcher(root: Path) -> None:
    async def ask() -> None:
        store = Asked(root)
        watcher = RootWatcher(
            "lab",
            store,
            asyncio.to_thread,
            poll_s=0.02,
            metrics=ServiceMetrics(),  # type: ignore[arg-type]
        )
        waiting = [asyncio.create_task(watcher.wait("run7", 1, 10)) for _ in range(300)]
        await asyncio.sleep(0.2)
        assert watcher.waiting == 300
        before, begun = store.exists_calls, time.monotonic()
        await asyncio.sleep(0.3)
        looks = (time.monotonic() - begun) / 0.02
        assert store.exists_calls - before <= 4 * (looks + 2)  # not 300 times as many
        await asyncio.to_thread(publish_one, root, seed=1)
        found = await asyncio.gather(*waiting)
        assert {entry.number for entry in found if entry is not None} == {2}
        await asyncio.sleep(0.1)
        before = store.exists_calls
        await asyncio.sleep(0.1)
        assert store.exists_calls == before  # nobody waits, so nobody looks
        store.broken = True
        with pytest.raises(StorageError, match="down"):
            await watcher.latest("run7")
        waits = asyncio.create_task(watcher.wait("run7", 2, 10))
        with pytest.raises(StorageError, match="down"):
            await waits
        store.broken = False
        assert (await watcher.latest("run7")) is not None
        ends = asyncio.create_task(watcher.wait("run7", 2, 10))
        await asyncio.sleep(0.05)
        await watcher.close()
        assert await ends is None
        with pytest.raises(StorageError, match="stopping"):
            await watcher.latest("run7")

    asyncio.run(ask())
