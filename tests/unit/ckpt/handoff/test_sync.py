"""The sidecar's rounds: what it serves, what it passes over, what it never deletes."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from support.memory_engine import MemoryEngine
from support.published import damage, publish_one

from ckpt.errors import ConfigError, NoCheckpoint, StorageError
from ckpt.handoff import sync, sync_watch
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.registry import Registry, Version
from ckpt.handoff.sync import Sidecar, SyncConfig, default_holder
from ckpt.handoff.sync_watch import Watcher
from ckpt.peft import WEIGHTS_NAME


def name(number: int) -> str:
    return f"run7-v{number:08d}"


@dataclass
class Site:
    """A root, a cache, engines, and a sidecar whose threads are stepped by hand."""

    root: Path
    directory: Path
    engines: list[MemoryEngine]
    options: dict = field(default_factory=dict)
    cache: VersionCache | None = None

    def begin(self, **changes: float) -> None:
        """A new sidecar; as after a restart, if there was one."""
        if self.cache is not None:
            self.cache.close()
        bounds = {"max_versions": self.options.get("max_versions"), "grace_s": 0.0}
        self.cache = VersionCache(self.directory, root="here", **bounds)
        self.registry = Registry(self.root, run="run7")
        config = SyncConfig(run="run7", holder="me", **{"linger_s": 0.0, **changes})
        self.sidecar = Sidecar(self.registry, self.engines, self.cache, config)
        self.watcher: Watcher = self.sidecar._watcher

    def turn(self) -> None:
        self.watcher.look()
        self.sidecar._not_before = 0.0
        self.sidecar._tidied = -100.0
        self.sidecar.step()

    @property
    def ready(self) -> bool:
        return self.sidecar.status.readiness()[0]

    @property
    def live(self) -> str | None:
        return self.sidecar.status.readiness()[1]["version"]

    @property
    def problems(self) -> dict[str, str]:
        return self.sidecar.status.readiness()[1]["passed_over"]

    def cached(self) -> list[str]:
        assert self.cache is not None
        return [entry.name for entry in self.cache.entries()]

    def publish(self, seed: int = 0) -> str:
        return publish_one(self.root, seed=seed)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(sync, "FIRST_REST_S", 0.0)
    site = Site(tmp_path / "root", tmp_path / "cache", [MemoryEngine()])
    site.publish()
    site.begin()
    yield site
    assert site.cache is not None
    site.cache.close()


def test_the_newest_is_served_and_the_old_one_unloaded(site: Site) -> None:
    site.turn()
    assert (site.ready, site.live) == (True, name(1))
    for seed in (1, 2):
        site.publish(seed)
    site.turn()
    assert (site.ready, site.live) == (True, name(3))
    assert site.engines[0].loads == [name(1), name(3)]
    assert set(site.engines[0].loaded) == {name(3)}


def test_the_moments_of_the_last_switch_are_told(site: Site) -> None:
    assert site.sidecar.status.readiness()[1]["last_switch"] is None
    before = time.time()
    site.turn()
    switch = site.sidecar.status.readiness()[1]["last_switch"]
    assert switch["version"] == name(1)
    assert before <= switch["seen"] <= switch["cached"] <= switch["live"] <= time.time()
    assert 0 < switch["load_s"] + switch["proof_s"] <= switch["live"] - switch["cached"]
    site.turn()
    assert site.sidecar.status.readiness()[1]["last_switch"] == switch


def test_nothing_published_yet_is_not_ready_and_no_error(tmp_path: Path) -> None:
    empty = Site(tmp_path / "root", tmp_path / "cache", [MemoryEngine()])
    empty.begin()
    empty.turn()
    assert not empty.ready
    assert empty.sidecar.status.readiness()[1]["store"] == "ok"
    assert empty.sidecar.status.health()[0]
    empty.publish()
    empty.turn()
    assert empty.ready


def test_a_restarted_sidecar_learns_from_the_engine_and_loads_nothing_again(site: Site) -> None:
    site.turn()
    site.begin()
    assert not site.ready
    site.turn()
    assert (site.ready, site.live) == (True, name(1))
    assert site.engines[0].loads == [name(1)]


def test_a_restarted_engine_is_brought_back(site: Site) -> None:
    site.turn()
    site.engines[0].restart()
    site.engines[0].away = True
    site.turn()
    assert not site.ready
    site.engines[0].away = False
    site.turn()
    assert site.ready
    assert site.engines[0].loads == [name(1), name(1)]


def test_a_damaged_version_is_passed_over_with_a_message_until_a_good_one_comes(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.turn()
    damage(site.root, site.publish(1))
    site.turn()
    assert (site.ready, site.live) == (True, name(1))
    assert "CRC32" in site.problems[name(2)] or "SHA-256" in site.problems[name(2)]
    assert f"{name(2)} is passed over" in caplog.text
    assert 'passed_over_total{reason="damaged"} 1' in site.sidecar.status.metrics()
    site.publish(2)
    site.turn()
    assert site.live == name(3)
    assert name(2) not in site.engines[0].loads


def test_from_nothing_the_newest_good_one_below_a_damaged_one_is_served(site: Site) -> None:
    for seed in (1, 2):
        damage(site.root, site.publish(seed))
    site.turn()
    assert (site.ready, site.live) == (True, name(1))


@pytest.mark.parametrize("how", ["refuses", "wrong"])
def test_a_version_that_an_engine_will_not_serve_leaves_the_old_one(how: str, site: Site) -> None:
    site.turn()
    getattr(site.engines[0], how).add(site.publish(1))
    site.turn()
    assert (site.ready, site.live) == (True, name(1))
    site.turn()
    site.turn()
    assert name(2) in site.problems
    assert (site.ready, site.live) == (True, name(1))
    site.publish(2)
    site.turn()
    assert site.live == name(3)


def test_a_fresh_engine_gets_the_one_before_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "FIRST_REST_S", 60.0)
    site.engines[0].refuses.add(site.publish(1))
    site.begin()
    site.turn()
    assert not site.ready
    site.turn()
    assert (site.ready, site.live) == (True, name(1))
    assert site.engines[0].loads == [name(2), name(1)]


def test_an_engine_that_is_away_says_nothing_of_the_version(tmp_path: Path) -> None:
    engines = [MemoryEngine(f"http://127.0.0.1:{port}") for port in (1, 2)]
    site = Site(tmp_path / "root", tmp_path / "cache", engines)
    site.publish()
    site.begin()
    engines[1].away = True
    site.turn()
    assert not site.ready
    assert site.problems == {}
    engines[1].away = False
    assert site.sidecar._not_before > time.monotonic()
    site.sidecar.step()  # it need not wait for the end of a pause
    assert site.ready


def test_while_the_store_is_down_engines_are_looked_after(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.turn()
    with monkeypatch.context() as patch:
        break_store(patch)
        site.engines[0].restart()
        site.turn()
        assert (site.ready, site.live) == (True, name(1))
        assert "HTTP 503" in site.sidecar.status.readiness()[1]["store"]
        assert site.sidecar.status.health()[0]
        # Sidecar and engine both gone while the store is down: the cache has what is needed.
        site.engines[0].restart()
        site.begin()
        site.turn()
        assert (site.ready, site.live) == (True, name(1))
    site.publish(1)
    site.turn()
    assert site.live == name(2)


def break_store(patch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise StorageError("s3://bucket/run7: HTTP 503")

    patch.setattr(sync_watch, "version_names", down)
    for method in ("get", "place", "lease", "release", "leases"):
        patch.setattr(Registry, method, down)


def test_a_cached_copy_that_rotted_is_not_served_while_the_store_is_down(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.turn()
    rot(site.directory / name(1) / WEIGHTS_NAME)
    site.begin()
    site.engines[0].restart()
    with monkeypatch.context() as patch:
        break_store(patch)
        site.turn()
        assert not site.ready
        assert site.engines[0].loaded == {}
    site.turn()
    assert site.ready


def test_what_engines_list_is_never_deleted_and_the_cache_stays_bounded(site: Site) -> None:
    site.options["max_versions"] = 3
    site.begin(slots=3)
    site.turn()
    # Somebody else still uses the first one, so it stays loaded.
    site.registry.lease(name(1), "somebody", 60)
    for seed in range(1, 8):
        site.publish(seed)
        site.turn()
        assert site.live == name(seed + 1)
        for path in site.engines[0].loaded.values():
            assert path is not None
            assert (Path(path) / WEIGHTS_NAME).is_file()
        assert len(site.cached()) <= 3
    assert {name(1), name(8)} == set(site.engines[0].loaded)
    assert name(1) in site.cached()
    assert "ckpt_sync_cache_evictions_total 5" in site.sidecar.status.metrics()


def test_nothing_is_deleted_while_one_engine_has_not_been_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "FIRST_REST_S", 0.0)
    engines = [MemoryEngine(f"http://127.0.0.1:{port}") for port in (1, 2)]
    site = Site(tmp_path / "root", tmp_path / "cache", engines, {"max_versions": 2})
    site.publish()
    site.begin(linger_s=3600.0)
    site.turn()
    site.publish(1)
    site.turn()
    engines[0].unload(name(1))  # the other one still has it
    site.publish(2)
    site.begin()
    engines[1].away = True
    for _ in range(3):
        site.turn()
        assert site.cached() == [name(1), name(2)]
    assert "their use unknown" in site.problems[name(3)]
    engines[1].away = False
    engines[1].loaded.pop(name(1))
    for _ in range(3):
        site.turn()
    assert site.live == name(3)


def test_a_copy_that_rots_before_it_is_handed_over_is_copied_again(site: Site) -> None:
    site.watcher.look()
    rot(site.directory / name(1) / WEIGHTS_NAME)
    site.sidecar.step()
    assert not site.ready
    assert site.engines[0].loads == []
    site.turn()
    assert (site.ready, site.live) == (True, name(1))


def test_a_copy_that_rotted_while_it_was_live_is_not_loaded_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.turn()
    rot(site.directory / name(1) / WEIGHTS_NAME)
    site.engines[0].restart()
    with monkeypatch.context() as patch:
        break_store(patch)
        site.turn()
        assert not site.ready
        assert site.engines[0].loads == [name(1)]
    site.turn()
    assert site.ready
    data = (site.directory / name(1) / WEIGHTS_NAME).read_bytes()
    assert hashlib.sha256(data).hexdigest() == site.registry.get(1).adapter_sha256


def rot(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()  # the root has the same file
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_full_cache_is_said_and_not_the_end(site: Site) -> None:
    site.options["max_versions"] = 2
    site.begin(slots=3)
    site.turn()
    site.registry.lease(name(1), "somebody", 60)
    site.publish(1)
    site.turn()
    site.registry.lease(name(2), "somebody", 60)
    site.publish(2)
    site.turn()
    assert (site.ready, site.live) == (True, name(2))
    assert "2 in use" in site.problems[name(3)]
    site.registry.release(name(1), "somebody")
    for _ in range(3):
        site.turn()
    assert site.live == name(3)


def test_a_version_that_no_cache_could_hold_is_passed_over_for_one_that_fits(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "FIRST_REST_S", 60.0)
    site.publish(1)
    site.begin()
    assert site.cache is not None
    fits = site.registry.get(1).bytes
    site.cache._max_bytes = fits
    get = site.registry.get
    large = {name(2): replace(get(2), files=get(2).files * 2)}
    monkeypatch.setattr(site.registry, "get", lambda which: large.get(which) or get(which))
    puts: list[str] = []
    put = site.registry.storage.put
    monkeypatch.setattr(
        site.registry.storage, "put", lambda path, data: (puts.append(path), put(path, data))[1]
    )
    now = 1000.0
    monkeypatch.setattr(site.sidecar._setbacks, "_clock", lambda: now)
    for _ in range(10):
        now += 2.0
        site.turn()
    assert (site.ready, site.live) == (True, name(1))
    assert "raise them" in site.problems[name(2)]
    assert sum(name(2) in path for path in puts) == 1, "a lease a look would never end"


def test_leases_follow_what_is_served(site: Site) -> None:
    site.turn()
    keeper = site.sidecar._leases
    keeper.start()
    until(lambda: held(site, 1) == ["me"])
    site.publish(1)
    site.turn()
    site.turn()  # one that sees that the old one is no longer listed
    until(lambda: (held(site, 1), held(site, 2)) == ([], ["me"]))
    keeper.stop()


def test_a_version_is_leased_before_it_is_offered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    pulled, offered = threading.Event(), []
    lease = Registry.lease

    def slow(self: Registry, *args: Any) -> object:
        assert pulled.wait(10)  # the copy does not wait for the lease
        offered.append(site.watcher.offer())
        return lease(self, *args)

    place = Registry.place

    def watched(self: Registry, v: Version, into: Path) -> Path:
        found = place(self, v, into)
        pulled.set()
        return found

    monkeypatch.setattr(Registry, "lease", slow)
    monkeypatch.setattr(Registry, "place", watched)
    site.watcher.look()
    assert offered == [None]
    assert site.watcher.offer() is not None
    assert held(site, 1) == ["me"]


def test_a_version_without_a_lease_is_not_offered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise NoCheckpoint("it is being deleted")

    with monkeypatch.context() as patch:
        patch.setattr(Registry, "lease", refused)
        site.turn()
        assert site.live is None
    site.turn()
    assert site.live == name(1)


def test_a_claim_shortens_the_time_between_looks(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.begin(poll_s=60.0)
    site.turn()
    assert site.watcher._pause_s() == 60.0
    claim = site.root / "adapters" / f"{name(2)}.claim.json"
    claim.write_bytes((site.root / "adapters" / f"{name(1)}.claim.json").read_bytes())
    site.turn()
    assert site.watcher._pause_s() == sync_watch.HURRY_S
    # Not for ever: its writer may have died.
    later = time.monotonic() + sync_watch.HURRY_FOR_S + 1
    monkeypatch.setattr(sync_watch.time, "monotonic", lambda: later)
    assert site.watcher._pause_s() == 60.0


def held(site: Site, number: int) -> list[str]:
    return [lease.holder for lease in site.registry.leases(name(number))]


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_version_deleted_at_the_root_is_served_on(site: Site) -> None:
    site.turn()
    shutil.rmtree(site.root / "adapters" / name(1))
    site.turn()
    assert (site.ready, site.live) == (True, name(1))


def test_a_surprise_is_logged_counted_and_survived(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, look = Sidecar.step, Watcher.look
    once = {"step": 1, "look": 1}

    def surprising(what: str, real: Callable[..., object]) -> Callable[..., object]:
        def call(self: object) -> object:
            if once[what]:
                once[what] -= 1
                raise RuntimeError(f"a surprise in {what}")
            return real(self)

        return call

    monkeypatch.setattr(Sidecar, "step", surprising("step", step))
    monkeypatch.setattr(Watcher, "look", surprising("look", look))
    monkeypatch.setattr(sync_watch, "FIRST_PAUSE_S", 0.01)
    site.begin(check_s=0.02, poll_s=0.02)
    stop = threading.Event()
    thread = threading.Thread(target=site.sidecar.run, args=(stop,))
    thread.start()
    until(lambda: site.ready)
    assert site.sidecar.status.health() == (True, {"healthy": True})
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert "a surprise in step" in caplog.text
    assert "a surprise in look" in caplog.text
    assert "ckpt_sync_errors_total 2" in site.sidecar.status.metrics()
    assert site.sidecar.status.health()[1]["stopped_threads"]


def test_a_round_that_does_not_end_is_no_health(site: Site) -> None:
    now = [0.0]
    status = type(site.sidecar.status)("run7", "me", [], clock=lambda: now[0])
    assert status.health()[0]
    now[0] = 1000.0
    assert status.health() == (False, {"healthy": False, "stuck_s": 1000.0})
    status.beat()
    assert status.health()[0]


def test_metrics_are_prometheus_text(site: Site) -> None:
    site.turn()
    text = site.sidecar.status.metrics()
    types: dict[str, str] = {}
    samples = []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, metric, kind = line.split(" ")
            assert metric not in types
            types[metric] = kind
        elif not line.startswith("# HELP "):
            labelled, value = line.rsplit(" ", 1)
            float(value)
            metric = labelled.partition("{")[0]
            base = metric.removesuffix("_sum").removesuffix("_count")
            assert types.get(metric, types.get(base)) in {"gauge", "counter", "summary"}, line
            assert (types.get(metric) == "counter") == metric.endswith("_total"), line
            samples.append(labelled)
    assert len(set(samples)) == len(samples)
    assert "ckpt_sync_current_version 1" in text.splitlines()
    assert "ckpt_sync_pulls_total 1" in text.splitlines()
    assert 'ckpt_sync_replica_live{engine="http://127.0.0.1:1"} 1' in text.splitlines()
    assert text.endswith("\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "a/b"},
        {"holder": "a b"},
        {"poll_s": 0.0},
        {"check_s": float("nan")},
        {"lease_ttl_s": 1.0},
        {"linger_s": -1.0},
    ],
)
def test_a_setting_that_cannot_work_is_refused(changes: dict) -> None:
    with pytest.raises(ConfigError):
        SyncConfig(**{"run": "run7", "holder": "me", **changes})


def test_a_holder_is_the_same_after_a_restart_and_nobody_elses(tmp_path: Path) -> None:
    mine = default_holder("node-3.example", "run7", tmp_path / "a")
    assert mine.startswith("sync-node-3-example-run7-")
    (tmp_path / "link").symlink_to(tmp_path)
    assert default_holder("node-3.example", "run7", tmp_path / "link" / "a") == mine
    others = {
        default_holder("node-3.example", "run7", tmp_path / "b"),  # another sidecar on the host
        default_holder("node-3-example", "run7", tmp_path / "a"),
        default_holder("n" * 300, "r" * 80, tmp_path / "a"),
        default_holder("n" * 300, "r" * 79, tmp_path / "a"),
        default_holder("ü" * 300, "r", tmp_path / "a"),
    }
    assert len(others - {mine}) == 5
    assert all(len(holder) <= 100 for holder in others)


def test_an_engine_that_goes_away_and_comes_back_is_said_once(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    site.engines[0].away = True
    with caplog.at_level(logging.INFO, logger="ckpt.handoff.sync"):
        for away in (True, True, False, False, True, True):
            site.engines[0].away = away
            site.turn()
    said = [record.getMessage() for record in caplog.records if record.name == "ckpt.handoff.sync"]
    assert [("away" in text, "answers" in text) for text in said] == [
        (True, False),
        (False, True),
        (True, False),
    ]
    assert "http://127.0.0.1:1" in said[0]
    assert "connection refused" in said[0]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_that_nothing_is_published_under_the_name_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, elsewhere: bool
) -> None:
    site = Site(tmp_path / "root", tmp_path / "cache", [MemoryEngine()])
    if elsewhere:
        publish_one(site.root, run="run8")
    site.begin()
    for _ in range(3):
        site.turn()
    (said,) = [r.getMessage() for r in caplog.records if "waiting for the first" in r.getMessage()]
    assert str(site.root) in said
    assert "run7" in said
    assert ("versions of run8" in said) == elsewhere


def test_an_engine_that_will_not_take_the_live_version_back_is_asked_ever_more_seldom(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 1000.0
    monkeypatch.setattr(sync.time, "monotonic", lambda: now)
    site.turn()
    engine = site.engines[0]
    engine.refuses.add(name(1))
    engine.restart()
    for _ in range(300):  # ten minutes
        now += 2.0
        site.turn()
    tries = len(engine.loads) - 1
    assert 10 <= tries <= 40
    assert not site.ready
    (said, *_) = [r.getMessage() for r in caplog.records if "not brought back" in r.getMessage()]
    assert "no such module" in said
    assert "still is" not in said
    engine.refuses.clear()
    engine.loaded = {"somebodys": None}
    now += 60.0
    site.turn()
    assert site.ready
    engine.restart()  # and the next loss is mended at once
    now += 2.0
    site.turn()
    assert site.ready


def test_a_restart_between_two_looks_need_not_wait_for_another_engines_pause(
    tmp_path: Path,
) -> None:
    engines = [MemoryEngine(f"http://127.0.0.1:{port}") for port in (1, 2)]
    site = Site(tmp_path / "root", tmp_path / "cache", engines)
    site.publish()
    site.begin()
    site.turn()
    assert site.ready
    engines[0].refuses.add(name(1))
    engines[0].restart()
    site.turn()
    assert site.sidecar._restore_at > time.monotonic()
    engines[1].restart()
    site.turn()
    assert name(1) in engines[1].loaded


def test_log_lines_hold_no_control_characters(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        site.turn()
    assert all("\n" not in record.getMessage() for record in caplog.records)
