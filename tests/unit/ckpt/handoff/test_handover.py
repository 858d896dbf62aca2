"""A version becomes live on every replica with proof, or the one before it stays."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.handovers import HOLDER, World, lists, loads_of
from support.probed_versions import PROMPT, publish_for

from ckpt.errors import ConfigError, StorageError
from ckpt.handoff.drivers import open_engine
from ckpt.handoff.engine import Engine
from ckpt.handoff.handover import Handover
from ckpt.handoff.registry import Registry
from ckpt.handoff.report import HandoverFailed
from ckpt.holds import Lease


def test_many_versions_follow_each_other(world: World):
    handover = world.handover()
    before = None
    for _ in range(6):
        version, path = world.version()
        report = handover.make_live(version, path)
        report.raise_if_failed()
        assert handover.current == version
        assert report.previous == before
        assert [item.state for item in report.replicas] == ["proven", "proven"]
        for item in report.replicas:
            assert item.evidence is not None
            assert item.evidence.by == "expected"
            assert item.evidence.moved > 0.1 > item.evidence.off
            assert item.load_ms > 0 < item.proof_ms
        done = handover.unload_unused()
        assert [item.version for item in done if item.done] == ([before] * 2 if before else [])
        assert lists(world) == [[version.name]] * 2
        assert handover.in_use == {version.name}
        assert set(handover.serving) == {engine.url for engine in world.engines}
        before = version.name
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ({"at": "load", "do": "base"}, "serves the base model"),
        ({"at": "load", "do": "half"}, "serves something else"),
        ({"at": "load", "do": "unlisted"}, "not on the replica's list"),
        ({"at": "answer", "do": "nan"}, "not finite"),
        ({"at": "load", "do": "error", "status": 500}, "HTTP 500"),
        ({"at": "generate", "do": "error", "status": 500}, "HTTP 500"),
    ],
)
@pytest.mark.parametrize("bad", [0, 1])
def test_a_load_that_is_not_what_it_says_leaves_the_old_version(
    world: World, fault: dict[str, object], reason: str, bad: int
):
    handover = world.handover()
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    new, new_path = world.version()
    world.servers[bad].faults({**fault, "name": new.name})
    report = handover.make_live(new, new_path)
    assert not report.live
    assert handover.current == old
    culprit = report.replicas[bad]
    assert culprit.state != "proven"
    assert reason in str(culprit.reason)
    assert culprit.url in report.explain()
    assert new.name in report.explain()
    assert report.replicas[1 - bad].state == "proven"
    with pytest.raises(HandoverFailed, match=reason):
        report.raise_if_failed()
    assert all(old.name in names for names in lists(world))
    if fault["do"] == "nan":
        world.servers[bad].restart()
        world.servers[bad].faults()
    world.servers[bad].faults()
    next_one, next_path = world.version()
    handover.make_live(next_one, next_path).raise_if_failed()


def test_another_adapter_under_the_name_is_found(world: World):
    handover = world.handover()
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    new, new_path = world.version()
    world.servers[1].faults({"at": "load", "do": "other", "path": str(old_path)})
    report = handover.make_live(new, new_path)
    assert not report.live
    assert "serves something else" in str(report.replicas[1].reason)


def test_a_name_that_proved_wrong_is_not_loaded_again_before_a_restart(world: World):
    handover = world.handover()
    version, path = world.version()
    bad = world.servers[1]
    bad.faults({"at": "load", "do": "half", "times": 1})
    assert not handover.make_live(version, path).live
    assert loads_of(bad, version.name) == 1
    assert version.name not in world.engines[1].adapters()
    again = handover.make_live(version, path)
    assert "proved wrong" in str(again.replicas[1].reason)
    assert loads_of(bad, version.name) == 1
    bad.restart()
    handover.make_live(version, path).raise_if_failed()


def test_retries_are_bounded_and_enough(world: World):
    handover = world.handover(retries=2)
    version, path = world.version()
    fault = {"at": "load", "do": "error", "status": 500}
    world.servers[0].faults({**fault, "times": 2})
    report = handover.make_live(version, path)
    report.raise_if_failed()
    assert report.replicas[0].attempts == 3
    version, path = world.version()
    world.servers[0].faults(fault)
    report = handover.make_live(version, path)
    assert report.replicas[0].attempts == 3
    assert loads_of(world.servers[0], version.name) == 3


def test_a_load_whose_answer_is_lost_is_not_sent_twice(world: World):
    handover = world.handover()
    version, path = world.version()
    world.servers[0].faults({"at": "load", "do": "drop", "after": True, "times": 1})
    handover.make_live(version, path).raise_if_failed()
    assert loads_of(world.servers[0], version.name) == 1


def test_a_replica_that_hangs_costs_its_deadline_and_no_more(world: World, tmp_path: Path):
    stuck = open_engine(world.servers[1].address, timeout_s=0.3)
    world.engines[1].close()
    world.engines[1] = stuck
    handover = world.handover(retries=1)
    version, path = world.version()
    world.servers[1].faults({"at": "load", "do": "hang", "seconds": 3})
    report = handover.make_live(version, path)
    assert not report.live
    assert "no answer within" in str(report.replicas[1].reason)
    assert report.total_ms < 3000
    world.servers[1].restart()  # the load would end in the middle of another test


def test_an_adapter_that_ends_its_engine_ends_one(world: World):
    """SGLang ends at the first use of a rank that lies; the others are spared, also later."""
    handover = world.handover()
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    bad, path = world.version()
    world.servers[0].faults({"at": "generate", "do": "die", "name": bad.name})
    report = handover.make_live(bad, path)
    assert not report.live
    assert [item.state for item in report.replicas] == ["failed", "untried"]
    assert "went away when it first used" in str(report.replicas[0].reason)
    assert not world.servers[0].alive
    assert loads_of(world.servers[1], bad.name) == 0
    world.servers[0].restart()
    restored = handover.restore_missing()
    assert restored is not None
    assert restored.live
    assert handover.current == old
    again = handover.make_live(bad, path)
    assert not again.live
    assert "not loaded again" in str(again.replicas[0].reason)
    assert loads_of(world.servers[0], bad.name) + loads_of(world.servers[1], bad.name) == 0
    good, good_path = world.version()
    handover.make_live(good, good_path).raise_if_failed()


def test_a_replica_that_was_only_cut_off_is_tried_again(world: World):
    handover = world.handover(retries=0)
    version, path = world.version()
    world.servers[0].faults(
        {"at": "generate", "do": "drop", "name": version.name},
        {"at": "health", "do": "error", "status": 503},
    )
    report = handover.make_live(version, path)
    assert "went away" in str(report.replicas[0].reason)
    world.servers[0].faults()
    handover.make_live(version, path).raise_if_failed()


def test_restarted_replicas_are_brought_back(world: World):
    handover = world.handover()
    assert handover.restore_missing() is None
    version, path = world.version()
    handover.make_live(version, path).raise_if_failed()
    assert handover.restore_missing() is None
    for server in world.servers:
        server.restart()
        report = handover.restore_missing()
        assert report is not None
        assert [item.url for item in report.replicas] == [server.url]
        assert report.live
    world.servers[0].kill()
    report = handover.restore_missing()
    assert report is not None
    assert not report.live
    assert handover.serving == (world.engines[1].url,)
    world.servers[0].start()
    assert handover.restore_missing().live
    assert lists(world) == [[version.name]] * 2


def test_a_restarted_replica_is_proven_anew_whatever_is_on_its_list(world: World):
    """Somebody else's start script put the name back, and what it serves is not the version."""
    handover = world.handover()
    version, path = world.version()
    handover.make_live(version, path).raise_if_failed()
    world.servers[0].restart()
    world.servers[0].faults({"at": "load", "do": "base"})
    world.engines[0].load(version.name, str(path))
    assert not handover.make_live(*world.version()).live  # learns of the restart, too
    report = handover.restore_missing()
    assert report is not None
    assert "serves the base model" in report.explain()
    assert handover.serving == (world.engines[1].url,)


def test_killed_in_the_middle_of_a_load(world: World):
    handover = world.handover(retries=1)
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    new, new_path = world.version()
    world.servers[1].faults({"at": "load", "do": "die"})
    report = handover.make_live(new, new_path)
    assert not report.live
    assert handover.current == old
    world.servers[1].restart()
    assert handover.restore_missing().live
    handover.make_live(new, new_path).raise_if_failed()


def test_a_quorum_switches_without_a_replica_that_is_away(world: World):
    handover = world.handover(quorum=1, retries=0)
    version, path = world.version()
    world.servers[0].kill()
    report = handover.make_live(version, path)
    assert report.live
    assert report.failures[0].url == world.engines[0].url
    assert handover.serving == (world.engines[1].url,)
    world.servers[0].start()
    assert handover.restore_missing().live
    assert len(handover.serving) == 2


def test_a_replica_that_is_away_does_not_hold_the_others_up(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    handover = world.handover(quorum=1, retries=0, retry_pause_s=0)
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    world.servers[0].kill()
    assert handover.restore_missing() is not None
    new, new_path = world.version()
    asked: list[str] = []
    bring = handover._bringer.bring

    def noted(engine: Engine, *rest: Any) -> Any:
        asked.append(engine.url)
        return bring(engine, *rest)

    monkeypatch.setattr(handover._bringer, "bring", noted)
    report = handover.make_live(new, new_path)
    report.raise_if_failed()
    assert asked == [world.engines[1].url, world.engines[0].url]
    assert [item.url for item in report.replicas] == [engine.url for engine in world.engines]


def test_leases_of_others_keep_an_old_version_loaded(world: World):
    handover = world.handover(slots=3)
    old, old_path = world.version()
    handover.make_live(old, old_path).raise_if_failed()
    world.registry.lease(old, "rollouts", 60.0)
    world.registry.lease(old, HOLDER, 60.0)
    new, new_path = world.version()
    handover.make_live(new, new_path).raise_if_failed()
    kept = handover.unload_unused()
    assert [item.done for item in kept] == [False, False]
    assert all("in use by rollouts" in str(item.reason) for item in kept)
    assert lists(world) == [[old.name, new.name]] * 2
    world.registry.release(old, "rollouts")
    assert all(item.done for item in handover.unload_unused())
    assert lists(world) == [[new.name]] * 2


def test_slots_are_never_exceeded(world: World):
    handover = world.handover(slots=2)
    names: list[str] = []
    for _ in range(3):
        version, path = world.version()
        handover.make_live(version, path).raise_if_failed()
        names.append(version.name)
        assert lists(world) == [names[-2:]] * 2  # nobody unloaded but the hand-over itself
    world.registry.lease(names[1], "rollouts", 60.0)
    full, path = world.version()
    report = handover.make_live(full, path)
    assert not report.live
    assert handover.current.name == names[2]
    assert "slots are taken" in report.explain()
    assert "in use by rollouts" in report.explain()
    assert lists(world) == [names[1:]] * 2
    world.registry.release(names[1], "rollouts")
    handover.make_live(full, path).raise_if_failed()
    assert lists(world) == [[names[2], full.name]] * 2


def test_adapters_of_others_are_left_alone(world: World, tmp_path: Path):
    foreign = publish_for(tmp_path / "elsewhere", "foreign", 7, None)
    path = Registry(tmp_path / "elsewhere").fetch(foreign, tmp_path / "theirs")
    for engine in world.engines:
        engine.load("foreign", str(path))
        engine.load(foreign.name, str(path))
    handover = world.handover(slots=3)
    for _ in range(2):
        version, path = world.version()
        report = handover.make_live(version, path)
    assert "loaded by others: foreign, foreign-v00000001" in report.explain()
    handover.unload_unused()
    assert all({"foreign", foreign.name} <= set(names) for names in lists(world))


def test_a_new_process_takes_over_what_the_old_one_loaded(world: World):
    first = world.handover()
    for _ in range(2):
        version, path = world.version()
        first.make_live(version, path).raise_if_failed()
    second = world.handover()
    report = second.make_live(version, path)
    report.raise_if_failed()
    assert [item.load_ms for item in report.replicas] == [0.0, 0.0]
    assert len(second.unload_unused()) == 2
    assert lists(world) == [[version.name]] * 2


def test_a_name_that_stands_for_another_path_is_left_there(world: World, tmp_path: Path):
    version, path = world.version()
    copy = world.registry.fetch(version, tmp_path / "second-cache")
    world.engines[0].load(version.name, str(copy))
    handover = world.handover()
    report = handover.make_live(version, path)
    assert not report.live
    assert f"stands for {copy}" in str(report.replicas[0].reason)
    assert world.engines[0].adapters()[version.name] == str(copy)


def test_a_store_that_cannot_say_who_uses_a_version_keeps_it(world: World):
    class Broken:
        def leases(self, v: str) -> list[Lease]:
            raise StorageError("the store is away")

    handover = Handover(world.engines, holder=HOLDER, registry=Broken(), slots=3)
    for _ in range(2):
        version, path = world.version()
        handover.make_live(version, path).raise_if_failed()
    kept = handover.unload_unused()
    assert kept
    assert all("the store is away" in str(item.reason) for item in kept)


def test_settings_that_cannot_work(world: World):
    for options in (
        {"slots": 1},
        {"retries": -1},
        {"quorum": 0},
        {"quorum": 3},
        {"retry_pause_s": -1.0},
        {"holder": "a b"},
    ):
        with pytest.raises(ConfigError):
            world.handover(**options)
    for engines in ([], [world.engines[0]] * 2):
        with pytest.raises(ConfigError, match="at least one replica"):
            Handover(engines, holder=HOLDER)


def test_requests_to_the_old_version_are_answered_throughout(world: World):
    """A reader that leases what is current never meets an error or another version's answer."""
    handover = world.handover(slots=4)
    version, path = world.version()
    handover.make_live(version, path).raise_if_failed()
    expected = {version.name: version.probe.logprobs}
    stop, answers = threading.Event(), [(version.name, expected[version.name])]
    readers = [open_engine(server.address) for server in world.servers]

    def read() -> None:
        while not stop.is_set():
            name = handover.current.name
            world.registry.lease(name, "reader", 60.0)
            if handover.current.name == name:
                for reader in readers:
                    answers.append((name, reader.logprobs(PROMPT, name)))
            world.registry.release(name, "reader")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for _ in range(5):
            version, path = world.version()
            expected[version.name] = version.probe.logprobs
            handover.make_live(version, path).raise_if_failed()
            handover.unload_unused()
            deadline = time.monotonic() + 30
            while answers[-1][0] != version.name:
                assert time.monotonic() < deadline
                time.sleep(0.005)
    finally:
        stop.set()
        thread.join()
        for reader in readers:
            reader.close()
    for name, answer in answers:
        assert answer == pytest.approx(expected[name])
