"""What is kept: the best by a metric, what is pinned, what is in use; on both kinds of store."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from support.publishers import publish
from support.steps import tiny_adapter, write_step, write_writer
from support.tiny_run import Run

from ckpt import CheckpointManager, ConfigError, Retention
from ckpt import holds as module
from ckpt.errors import DamagedError, NoCheckpoint
from ckpt.holds import (
    hold,
    list_leases,
    pin,
    pinned,
    read_pin,
    release_lease,
    remove_unless_held,
    take_lease,
    unpin,
)
from ckpt.layout import lease_path, parse_lease, parse_pin, pin_path
from ckpt.manifest import StepManifest
from ckpt.retain import Keeper, judge
from ckpt.storage import open_storage


@pytest.fixture(params=["posix", "memory"])
def root(request, tmp_path):
    if request.param == "posix":
        return str(tmp_path / "root")
    return f"memory://{tmp_path.name}-{random.SystemRandom().getrandbits(64)}"


@pytest.fixture
def storage(root):
    return open_storage(root)


def steps_of(storage):
    return [entry.name for entry in storage.list("steps")]


def name(step, epoch=1):
    return f"step-{step:08d}.w{epoch:04d}"


def kept(fates):
    return {fate.step: fate.reason for fate in fates if fate.keep}


PAIRS = [(step, 1) for step in (5, 4, 3, 2, 1, 0)]
SCORES = {
    (5, 1): {"reward": 0.1},
    (4, 1): {"reward": 0.7},
    (3, 1): {"reward": 0.2, "loss": 9.0},
    (2, 1): {"reward": 0.7},
    (0, 1): {"reward": 0.9, "loss": 1.0},
}


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (Retention(latest=1, best=2, metric="reward"), {5, 0, 4}),  # of equal ones the newer
        (Retention(latest=1, best=2, metric="reward", mode="min"), {5, 3}),
        (Retention(latest=1, best=5, metric="loss"), {5, 3, 0}),  # steps without it do not count
        (Retention(latest=1, best=1, metric="unknown"), {5}),
        (Retention(latest=2, every=3, best=1, metric="reward"), {5, 4, 3, 0}),
    ],
)
def test_best_by_a_metric(rule, steps):
    assert set(kept(judge(PAIRS, [], rule, scores=SCORES))) == steps


def test_the_reasons_say_why():
    rule = Retention(latest=2, every=2, best=1, metric="reward")
    fates = judge(PAIRS, [(9, 1)], rule, scores=SCORES, pinned={name(1)})
    assert {fate.step: fate.reason for fate in fates} == {
        5: "newest valid",
        4: "among the latest 2, a multiple of 2",
        3: "no rule keeps it",
        2: "a multiple of 2",
        1: "pinned",
        0: "a multiple of 2, among the best 1 by reward (0.9)",
        9: "abandoned: a later writer resumed from before it",
    }
    assert [fate.step for fate in fates if not fate.keep] == [3, 9]


def test_pinned_abandoned_steps_stay():
    (fate,) = judge([], [(9, 1)], Retention(), pinned={name(9)})
    assert fate.keep
    fates = judge(PAIRS, [(9, 1), (8, 1)], Retention(latest=1), pinned={name(9)})
    assert 9 in kept(fates)
    assert 8 not in kept(fates)


@pytest.mark.parametrize(
    "settings",
    [{"best": 1}, {"metric": "x"}, {"best": 0, "metric": "x"}, {"mode": "most"}],
)
def test_rules_that_cannot_work(settings):
    with pytest.raises(ConfigError):
        Retention(**settings)


def test_a_manager_keeps_the_best_and_says_so_in_the_manifest(root, storage):
    run = Run()
    rewards = {0: 0.1, 1: 0.9, 2: 0.3, 3: 0.2, 4: None}
    rule = Retention(latest=1, best=1, metric="reward")
    with CheckpointManager(root, retention=rule) as manager:
        for step, reward in rewards.items():
            manager.save(step, run.state, metrics=None if reward is None else {"reward": reward})
        manager.wait()
    assert steps_of(storage) == [name(1), name(4)]
    found = {}
    for step in (1, 4):
        path = f"steps/{name(step)}/MANIFEST.json"
        data = storage.read(path)
        found[step] = StepManifest.from_bytes(data, path).metrics
        # Without metrics the document is one that readers of schema 1 know.
        assert (b'"schema":2' in data, b'"metrics"' in data) == ((step == 1), (step == 1))
    assert found == {1: {"reward": 0.9}, 4: {}}
    # A later writer, which has saved none of them, reads the values back.
    with CheckpointManager(root, retention=rule) as manager:
        assert manager.restore(run.state) == 4
        manager.save(5, run.state, metrics={"reward": 0.5}).wait(30)
        manager.wait()
    assert steps_of(storage) == [name(1), name(5, 2)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "high", None, 10**400])
def test_metrics_are_finite_numbers(tmp_path, value):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ConfigError, match=r"metrics\['reward'\]"):
            manager.save(0, Run().state, metrics={"reward": value})
        with pytest.raises(ConfigError, match="name"):
            manager.save(0, Run().state, metrics={"": 1.0})
        manager.save(0, Run().state).wait(30)  # nothing is broken by it


def test_pins_hold_until_they_are_taken_away(root, storage):
    run = Run()
    with CheckpointManager(root, retention=Retention(latest=1)) as manager:
        manager.save(0, run.state).wait(30)
        record = pin(storage, name(0), "before the change")
        assert read_pin(storage, name(0)) == record
        for step in (1, 2):
            manager.save(step, run.state).wait(30)
        manager.wait()
        assert steps_of(storage) == [name(0), name(2)]
        assert pinned(storage) == {name(0)}
        assert unpin(storage, name(0))
        assert not unpin(storage, name(0))
        manager.save(3, run.state).wait(30)
        manager.wait()
    assert steps_of(storage) == [name(3)]


def test_a_damaged_pin_holds_all_the_same(storage):
    write_step(storage, 0, tiny_adapter()[0])
    pin(storage, name(0))
    storage.put(pin_path(name(0)), b"{")
    with pytest.raises(DamagedError):
        read_pin(storage, name(0))
    assert hold(storage, name(0)) == "pinned"
    assert remove_unless_held(storage, name(0)) == "pinned"
    assert pinned(storage) == {name(0)}


def test_only_what_exists_can_be_pinned(storage):
    with pytest.raises(NoCheckpoint, match="does not exist"):
        pin(storage, name(7))
    for wrong in ("notes", "../x", "step-1", ""):
        with pytest.raises(ConfigError):
            pin(storage, wrong)
    assert pinned(storage) == set()
    storage.put("pins/notes.txt", b"mine")
    storage.put("pins/notes.json", b"mine")
    assert pinned(storage) == set()


def test_a_hold_that_appears_while_it_is_deleted_brings_it_back(storage):
    """Either the one who pins finds it gone, or the one who deletes finds the pin."""
    write_step(storage, 0, tiny_adapter()[0])
    before = storage.read(f"steps/{name(0)}/MANIFEST.json")
    asked = []

    def held(*_args):
        asked.append(storage.exists(f"steps/{name(0)}/MANIFEST.json"))
        return "pinned" if len(asked) == 2 else None

    assert remove_unless_held(storage, name(0), held) == "pinned"
    assert asked == [True, False]  # looked once more when it was out of sight
    assert storage.read(f"steps/{name(0)}/MANIFEST.json") == before
    assert remove_unless_held(storage, name(0)) is None
    assert steps_of(storage) == []


def test_a_pin_that_comes_too_late_is_refused(storage, monkeypatch):
    write_step(storage, 0, tiny_adapter()[0])
    put = type(storage).put

    def put_and_vanish(self, path, data):
        put(self, path, data)
        if path.startswith("pins/"):
            self.delete_tree(f"steps/{name(0)}")

    monkeypatch.setattr(type(storage), "put", put_and_vanish)
    with pytest.raises(NoCheckpoint):
        pin(storage, name(0))
    assert pinned(storage) == set()


def test_leased_and_pinned_versions_stay(root, storage):
    names = [publish(root, "run7", step) for step in range(5)]
    take_lease(storage, names[0], "replica-1", 600)
    take_lease(storage, names[1], "replica-2", 600)
    pin(storage, names[2])
    keeper = Keeper(storage, Retention(versions=1), "run7")
    keeper.prune_versions()

    def left():
        return [e.name for e in storage.list("adapters") if e.is_dir]

    assert left() == [names[0], names[1], names[2], names[4]]
    release_lease(storage, names[0], "replica-1")
    keeper.prune_versions()
    assert left() == [names[1], names[2], names[4]]


def test_a_lease_runs_out_and_is_renewed(storage, root, monkeypatch):
    version = publish(root, "run7", 1)
    lease = take_lease(storage, version, "replica-1", 10)
    assert list_leases(storage) == [lease]
    now = datetime.fromisoformat(lease.renewed)
    assert lease.live(now)
    assert lease.live(now + timedelta(seconds=10 + module.CLOCK_SKEW_S - 1))
    assert not lease.live(now + timedelta(seconds=10 + module.CLOCK_SKEW_S + 1))
    monkeypatch.setattr(module, "CLOCK_SKEW_S", -3600.0)  # as if an hour had passed
    assert hold(storage, version) is None
    take_lease(storage, version, "replica-1", 7200)
    assert hold(storage, version) == "in use by replica-1"


def test_a_lease_that_cannot_be_read_counts_as_live(storage, root):
    version = publish(root, "run7", 1)
    storage.put(lease_path(version, "replica-1"), b"torn")
    storage.put(f"leases/{version}/notes.txt", b"mine")
    assert hold(storage, version) == "in use by replica-1"
    take_lease(storage, version, "replica-2", 1)
    data = storage.read(lease_path(version, "replica-2"))
    storage.put(lease_path(version, "replica-3"), data)  # another holder's record
    assert {
        lease.holder: lease.live(datetime.now(UTC) + timedelta(days=9))
        for lease in list_leases(storage)
    } == {
        "replica-1": True,
        "replica-2": False,
        "replica-3": True,
    }


def test_leases_that_cannot_be_taken(storage, root):
    version = publish(root, "run7", 1)
    with pytest.raises(NoCheckpoint):
        take_lease(storage, "run7-v00000099", "replica-1", 1)
    for ttl in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="at most 2592000 s"):
            take_lease(storage, version, "replica-1", ttl)
    for bad in ("../x", "a/b", ""):
        with pytest.raises(ConfigError):
            take_lease(storage, version, bad, 1)
        with pytest.raises(ConfigError):
            take_lease(storage, bad, "replica-1", 1)
    with pytest.raises(ConfigError):
        take_lease(storage, "notes", "replica-1", 1)
    assert list_leases(storage) == []


def test_names_of_holds():
    assert parse_pin(f"{name(3)}.json") == name(3)
    assert parse_pin("run7-v00000001.json") == "run7-v00000001"
    assert [parse_pin(x) for x in ("a.json", name(3), f"{name(3)}.txt")] == [None] * 3
    assert parse_lease("run7-v00000001", "r.json") == ("run7-v00000001", "r")
    assert parse_lease("run7-v00000001", "r.txt") is None
    assert parse_lease("run7", "r.json") is None


def test_the_schema_of_a_document_says_which_members_it_may_have(storage):
    from ckpt.envelope import seal, unseal

    document = write_step(storage, 0, tiny_adapter()[0])
    data = document.to_bytes()
    body = unseal(data, "ckpt.step", 1, "here")
    for metrics, schema, problem in (
        ({"a": 1.0}, 1, "metrics is not a member of schema 1"),
        ({"a": 1}, 2, "finite number with a fraction"),
        ({}, 2, "must not be empty"),
        ({"": 1.0}, 2, "names of 1 to 200"),
        ([1.0], 2, "must be an object"),
    ):
        with pytest.raises(DamagedError, match=problem):
            StepManifest.from_bytes(seal("ckpt.step", schema, {**body, "metrics": metrics}), "here")
    whole = StepManifest.from_bytes(seal("ckpt.step", 2, {**body, "metrics": {"a": 1.0}}), "here")
    assert whole.metrics == {"a": 1.0}
    assert StepManifest.from_bytes(whole.to_bytes(), "here") == whole
    with pytest.raises(DamagedError, match="newer than 1"):
        unseal(whole.to_bytes(), "ckpt.step", 1, "an older reader")


def test_damaged_steps_are_neither_counted_nor_deleted(storage):
    for step in range(4):
        write_step(storage, step, tiny_adapter()[0])
    write_writer(storage, 2, parent=(1, 1))
    from ckpt.retain import review

    path = f"steps/{name(1)}/MANIFEST.json"
    storage.put(path, storage.read(path)[:-1])
    found = {entry.step: (fate.keep, fate.reason) for entry, fate in review(storage, Retention(1))}
    assert found == {
        0: (True, "newest valid"),
        1: (True, "damaged: not counted, left alone"),
        2: (False, "abandoned: a later writer resumed from before it"),
        3: (False, "abandoned: a later writer resumed from before it"),
    }
