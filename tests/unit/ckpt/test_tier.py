"""A tier without processes: what is in it, what may go, and which copy a restore takes."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from support.ranks_tiers import flip, wait_for
from support.tiny_run import Run

from ckpt import CheckpointManager, ConfigError, DamagedError, NoCheckpoint, Retention, StorageError
from ckpt.errors import CommitUnknown, UnrestoredRoot
from ckpt.holds import pin
from ckpt.layout import PART, mark_path, parse_mark
from ckpt.locks import FileLock
from ckpt.mirror import Mirror
from ckpt.part import Part
from ckpt.session import Beat, Session, read_beat, write_beat
from ckpt.storage import open_storage
from ckpt.storage.evicting import EvictingStorage
from ckpt.storage.posix import PosixStorage
from ckpt.supervisor import Supervisor
from ckpt.tier import Outcome, Tier, local_root
from ckpt.types import Chunk
from ckpt.upload import Uploader, drain
from ckpt.versions import list_versions, read_version


@pytest.fixture(autouse=True)
def _no_uploader(monkeypatch):
    """Nothing is mirrored unless the test says so."""
    monkeypatch.setattr(Supervisor, "_start", lambda self: None)


@pytest.fixture
def places(tmp_path):
    return str(tmp_path / "remote"), str(tmp_path / "tier")


def save(places, steps, *, run=None, mirrored=(), publish=False, **kw):
    """Save steps through the tier; mirror after those of ``mirrored``. Digests by step."""
    remote, tier = places
    run = run or Run()
    digests = {}
    with CheckpointManager(remote, local_tier=tier, retention=Retention(latest=9), **kw) as manager:
        manager.restore(run.state)
        for step in steps:
            run.step()
            manager.save(step, run.state, publish=publish)
            digests[step] = run.digest()
            manager.wait()
            if step in mirrored:
                mirror(places)
    return digests


def mirror(places):
    remote, tier = places
    return drain(tier, open_storage(remote))


def restored(places, **kw):
    remote, tier = places
    run = Run(seed=77)
    with CheckpointManager(remote, local_tier=tier) as manager:
        step = manager.restore(run.state, **kw)
        return step, manager.last_restore, run.digest()


def one(places, kind, pattern):
    [found] = Path(places[kind == "tier"]).glob(pattern)
    return found


DAMAGE = {
    "whole": lambda step: None,
    "shard": lambda step: flip(next(step.glob("shard-*"))),
    "header": lambda step: flip(next(step.glob("shard-*")), 12),
    "state": lambda step: flip(step / "state.json", 60),
    "manifest": lambda step: flip(step / "MANIFEST.json", 60),
    "short": lambda step: os.truncate(next(step.glob("shard-*")), 100),
    "missing": lambda step: next(step.glob("shard-*")).unlink(),
    "absent": shutil.rmtree,
}


@pytest.mark.parametrize("local", DAMAGE)
@pytest.mark.parametrize("there", ["whole", "shard", "absent"])
def test_which_copy_a_restore_takes(places, local, there):
    """The newest step that is whole somewhere; the local copy of it where that is whole."""
    digests = save(places, range(2), mirrored=[1])
    DAMAGE[local](one(places, "tier", "steps/step-00000001.w0001"))
    DAMAGE[there](one(places, "remote", "steps/step-00000001.w0001"))
    if local == "whole":
        want = (1, True)
    elif there == "whole":
        want = (1, False)
    else:
        want = (0, True)  # the older step, of which the tier has a copy as well
    step, report, digest = restored(places)
    assert (step, report.local) == want
    assert digest == digests[step]
    # What is not there at all is no damage; everything else that was passed over is told.
    passed = (local not in {"whole", "absent"}) + (local != "whole" and there == "shard")
    assert len(report.damaged) == passed


def test_a_step_by_number_is_taken_from_either_place_or_reported(places):
    save(places, range(2), mirrored=[1])
    flip(next(one(places, "tier", "steps/step-00000000.w0001").glob("shard-*")))
    step, report, _digest = restored(places, step=0)
    assert (step, report.local) == (0, False)
    flip(next(one(places, "remote", "steps/step-00000000.w0001").glob("shard-*")))
    with pytest.raises(DamagedError, match=r"not whole in the local tier.*; step 0 .*is damaged"):
        restored(places, step=0)
    with pytest.raises(NoCheckpoint, match="newest steps: 1, 0"):
        restored(places, step=5)


def test_a_disk_that_cannot_be_read_is_no_reason_not_to_ask_the_root(places, monkeypatch):
    digests = save(places, range(2), mirrored=[1])
    run = Run(seed=3)

    def fail(path, start, target):
        raise StorageError("read failed: Input/output error")

    with CheckpointManager(places[0], local_tier=places[1]) as manager:
        monkeypatch.setattr(manager._tiers.tier.storage, "read_into", fail)
        assert manager.restore(run.state) == 1
        assert not manager.last_restore.local
        assert "Input/output error" in manager.last_restore.damaged[0].reason
    assert run.digest() == digests[1]


def test_an_item_that_cannot_be_read_holds_up_no_other(places, monkeypatch):
    save(places, range(3))
    tier = Tier(places[1], places[0])
    next(Path(places[1]).glob("steps/step-00000001.*/shard-*")).unlink()
    read = tier.storage.read

    def fail(path, *span):
        if "step-00000000" in path and "shard" in path:
            raise StorageError("read failed: Input/output error")
        return read(path, *span)

    monkeypatch.setattr(tier.storage, "read", fail)
    session = Session.begin("d" * 24, places[0], "run", Retention(latest=9))
    failed, _waiting = Uploader(tier, open_storage(places[0]), session).round(tier.queue())
    assert failed, "it is tried again"
    assert tier.outcomes() == {
        "step-00000001.w0001": Outcome.damaged,
        "step-00000002.w0001": Outcome.mirrored,
    }


def test_a_save_says_what_the_uploader_has_sent(places):
    run = Run()
    run.step()
    remote = open_storage(places[0])
    with CheckpointManager(places[0], local_tier=places[1]) as manager:
        manager.save(0, run.state)
        manager.wait()
        tier = Tier(places[1], places[0])
        before = remote.traffic
        Uploader(tier, remote, Session.load(tier.storage)).round(tier.queue())
        sent = remote.traffic - before
        manager._tiers._supervisor._beat = read_beat(Path(places[1]))  # as its thread would
        handle = manager.save(1, run.state)
        manager.wait()
    size = sum(file.stat().st_size for file in Path(places[0]).glob("steps/*/shard-*"))
    assert size <= handle.metrics.extra["mirror_bytes"] <= sent.moved
    # The last requests belong to what follows an upload: retention.
    assert 4 <= handle.metrics.extra["mirror_requests"] <= sent.requests + before.requests


def test_steps_that_only_the_tier_holds_count_as_steps(places):
    save(places, range(2))
    with CheckpointManager(places[0], local_tier=places[1]) as manager:
        assert manager.steps() == [0, 1]
        with pytest.raises(UnrestoredRoot, match="not restored"):
            manager.save(2, Run().state)
    with CheckpointManager(places[0], local_tier=places[1], fresh=True) as manager:
        manager.save(0, Run().state).wait(30)
        assert manager.steps() == [0]
    done, _left, _problems = mirror(places)
    assert done == {
        "step-00000000.w0001": Outcome.abandoned,
        "step-00000001.w0001": Outcome.abandoned,
        "step-00000000.w0002": Outcome.mirrored,
    }


def test_rollback_leaves_later_steps_of_the_tier_behind(places):
    digests = save(places, range(3))
    run = Run(seed=6)
    with CheckpointManager(places[0], local_tier=places[1]) as manager:
        assert manager.restore(run.state, step=1) == 1
        assert run.digest() == digests[1]
        run.step()
        manager.save(2, run.state).wait(30)
        branch = run.digest()
    done, _left, _problems = mirror(places)
    assert done["step-00000002.w0001"] is Outcome.abandoned
    assert done["step-00000002.w0002"] is Outcome.mirrored
    shutil.rmtree(places[1])
    step, report, digest = restored(places)
    assert (step, report.epoch, digest) == (2, 2, branch)


def test_a_tier_belongs_to_one_root_and_one_run(places, tmp_path):
    save(places, [0])
    with pytest.raises(ConfigError, match=r"is the local tier of .*remote, not of .*other"):
        CheckpointManager(tmp_path / "other", local_tier=places[1])
    # The same place, but the run in it was begun anew: equal names, other steps.
    shutil.rmtree(places[0])
    with pytest.raises(ConfigError, match="holds steps of another run"):
        restored(places)
    with CheckpointManager(places[0], fresh=True) as manager:
        manager.save(0, Run(seed=2).state).wait(30)
    with pytest.raises(ConfigError, match="holds steps of another run"):
        restored(places)
    _done, _left, problems = mirror(places)
    assert "holds steps of another run" in problems[0]


@pytest.mark.parametrize(
    ("tier", "root", "match"),
    [
        ("s3://bucket/x", "remote", "must be a path or file:///path"),
        ("file://host/x", "remote", "must be a path or file:///path"),
        ("", "remote", "empty"),
        ("tier", "memory://x", "lies in this process alone"),
    ],
)
def test_what_cannot_be_a_tier_is_refused(tmp_path, monkeypatch, tier, root, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=match):
        CheckpointManager(root, local_tier=tier)


def test_a_tier_may_be_a_file_url(tmp_path):
    assert local_root(f"file://{tmp_path}/a%20b") == f"{tmp_path}/a b"


def test_options_that_json_cannot_carry_are_refused(tmp_path):
    pytest.importorskip("s3fs")
    with pytest.raises(ConfigError, match="travel to the uploader as JSON"):
        CheckpointManager(
            "s3://bucket/run", local_tier=tmp_path / "t", storage_options={"session": object()}
        )


@pytest.mark.parametrize("lose", [Path.unlink, flip])
def test_a_bad_record_at_the_root_settles_nothing_and_holds_up_nothing_else(places, lose):
    """What lies behind it may still count: it stays in the tier until the record is back."""
    for steps in (range(2), [2], [3]):  # three writers, each from where the last one ended
        save(places, steps)
    record = Path("writers", "0002.json")
    lose(Path(places[0], record))
    tier = Tier(places[1], places[0])
    session = Session.begin("d" * 24, places[0], "run", Retention(latest=9))
    assert Uploader(tier, open_storage(places[0]), session).round(tier.queue()) == (True, 0)
    assert tier.outcomes() == {"step-00000003.w0003": Outcome.mirrored}
    _done, _left, problems = mirror(places)
    assert sum("of writer 1 still counts is not known" in problem for problem in problems) == 2
    with pytest.raises(ConfigError, match=r"0002.json was damaged .* put the other"):
        restored(places)
    shutil.copy(Path(places[1], record), Path(places[0], record))
    done, left, problems = mirror(places)
    assert (set(done.values()), left, problems) == ({Outcome.mirrored}, [], [])
    assert restored(places)[0] == 3


@pytest.mark.parametrize("lose", [Path.unlink, flip])
def test_a_bad_record_of_an_older_writer_costs_no_step_of_the_tier(places, lose):
    run = Run()
    with CheckpointManager(places[0]) as manager:
        manager.save(0, run.state).wait(30)
    digests = save(places, [1])
    lose(Path(places[0], "writers", "0001.json"))
    assert restored(places)[::2] == (1, digests[1])
    assert restored(places, step=0)[0] == 0
    with CheckpointManager(places[0], local_tier=places[1]) as manager:
        assert manager.steps() == [0, 1]


def test_versions_are_numbered_by_the_root_and_made_in_the_tier(places):
    save(places, range(2), publish=True)
    claims = sorted(path.name for path in Path(places[0], "adapters").iterdir())
    assert claims == ["run-v00000001.claim.json", "run-v00000002.claim.json"]
    tier = Tier(places[1], places[0])
    assert [item.name for item in tier.versions()] == ["run-v00000001", "run-v00000002"]
    assert [item.name for item in tier.queue()][:2] == ["run-v00000001", "run-v00000002"]
    mirror(places)
    for name in ("run-v00000001", "run-v00000002"):
        for file in Path(places[1], "adapters", name).iterdir():
            assert file.read_bytes() == Path(places[0], "adapters", name, file.name).read_bytes()


def test_the_tier_keeps_the_newest_and_everything_that_is_not_mirrored(places):
    remote, tier_path = places
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path, retention=Retention(latest=2)) as manager:
        manager.restore(run.state)
        for step in range(4):
            manager.save(step, run.state).wait(30)
        manager.wait()
        tier = Tier(tier_path, remote)
        assert [item.pair[0] for item in tier.steps()] == [0, 1, 2, 3]
        mirror(places)
        pin(tier.storage, "step-00000001.w0001")
        manager.save(4, run.state).wait(30)
        manager.wait()
        assert [item.pair[0] for item in tier.steps()] == [1, 3, 4]
        assert set(tier.outcomes()) == {"step-00000001.w0001", "step-00000003.w0001"}


class Swept:
    """A root from which somebody removes a version's weights just before its manifest comes."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)

    def put(self, path, data):
        self._inner.put(path, data)
        self._sweep(path)

    def put_stream(self, path, chunks, size):
        self._inner.put_stream(path, chunks, size)
        self._sweep(path)

    def _sweep(self, path):
        if path.endswith("adapter_model.safetensors"):
            self._inner.delete(path)


def test_a_version_whose_files_vanish_goes_up_again(places):
    """Nothing is committed that is not there."""
    save(places, range(1), publish=True)
    tier, remote = Tier(places[1], places[0]), open_storage(places[0])
    (item,) = tier.versions()
    with pytest.raises(StorageError, match=r"adapter_model.* is missing; the version goes up"):
        Mirror(tier, Swept(remote), lambda count: None).run(item)
    assert list_versions(remote, "run")[0].state == "claimed"
    assert tier.outcomes() == {}
    assert Mirror(tier, remote, lambda count: None).run(item) is Outcome.mirrored
    read_version(remote, item.name)


def test_the_uploader_applies_the_retention_at_the_root(places):
    remote, tier_path = places
    save(places, range(5))
    tier = Tier(tier_path, remote)
    session = Session.begin("a" * 24, remote, "run", Retention(latest=1, every=2))
    session.save(tier.storage)
    uploader = Uploader(tier, open_storage(remote), session)
    assert uploader.run()
    left = sorted(path.name for path in Path(remote, "steps").iterdir())
    assert left == ["step-00000000.w0001", "step-00000002.w0001", "step-00000004.w0001"]
    assert read_beat(Path(tier_path)).mirrored == 5


def test_the_rule_at_the_root_is_that_of_its_newest_writer(places):
    """What is put up for an older one deletes nothing there."""
    save(places, range(3))
    save(places, [3])
    tier = Tier(places[1], places[0])
    session = Session.begin("e" * 24, places[0], "run", Retention(latest=1))
    uploader = Uploader(tier, open_storage(places[0]), session)
    *older, newest = tier.queue()
    assert uploader.round(older) == (False, 0)
    assert len(list(Path(places[0], "steps").iterdir())) == 3
    assert uploader.round([newest]) == (False, 0)
    assert [path.name for path in Path(places[0], "steps").iterdir()] == [newest.name]


def test_eviction_takes_abandoned_then_the_oldest_mirrored_and_nothing_else(places):
    save(places, range(4), mirrored=[1], publish=True)
    tier = Tier(places[1], places[0])
    abandoned = tier.steps()[2]
    tier.settle(abandoned, Outcome.abandoned)
    gone = []
    before = {item.name for item in (*tier.steps(), *tier.versions())}
    while tier.evict():
        now = {item.name for item in (*tier.steps(), *tier.versions())}
        gone += before - now
        before = now
    first, second = "step-00000000.w0001", "step-00000001.w0001"
    assert gone == [abandoned.name, first, second, "run-v00000001", "run-v00000002"]
    assert before == {"step-00000003.w0001", "run-v00000003", "run-v00000004"}
    assert not list(Path(places[1], "steps").glob(".trash-*"))


def test_a_lost_mark_costs_one_look_at_the_root(places):
    save(places, [0], mirrored=[0])
    Path(places[1], mark_path("step-00000000.w0001", "mirrored")).unlink()
    before = one(places, "remote", "steps/step-*/shard-*").stat().st_ino
    done, _left, _problems = mirror(places)
    assert done == {"step-00000000.w0001": Outcome.mirrored}
    assert one(places, "remote", "steps/step-*/shard-*").stat().st_ino == before


def test_another_attempt_at_the_root_is_reported_and_left_alone(places):
    save(places, range(2))
    source = one(places, "tier", "steps/step-00000000.w0001")
    target = Path(places[0], "steps", source.name)
    other = (Path(places[0] + "-2"), Path(places[1] + "-2"))
    save(tuple(map(str, other)), [0])
    shutil.copytree(next(other[1].glob("steps/step-*")), target)
    before = (target / "MANIFEST.json").read_bytes()
    tier = Tier(places[1], places[0])
    session = Session.begin("c" * 24, places[0], "run", Retention(latest=9))
    failed, waiting = Uploader(tier, open_storage(places[0]), session).round(tier.queue())
    assert (failed, waiting) == (True, 0)
    assert tier.outcomes() == {"step-00000001.w0001": Outcome.mirrored}, "it holds up no other"
    assert "another attempt" in read_beat(Path(places[1])).problem
    done, _left, problems = mirror(places)
    assert done == {}
    assert "another attempt" in problems[0]
    assert (target / "MANIFEST.json").read_bytes() == before


def test_a_part_must_be_whole_before_its_manifest_goes_up(places):
    """The tier of a coordinator whose other node has not sent its files yet."""
    save(places, [0])
    step = one(places, "tier", "steps/step-00000000.w0001")
    [shard] = step.glob("shard-*")
    (step / PART).write_bytes(Part(("state.json",), coordinator=True).to_bytes())
    _done, left, _problems = mirror(places)
    assert [item.name for item in left] == [step.name]
    assert not list(Path(places[0]).glob("steps/step-*"))
    scratch = one(places, "remote", "steps/.tmp-*")
    shutil.copy(shard, scratch)  # as the other node's uploader does
    done, left, _problems = mirror(places)
    assert done == {step.name: Outcome.mirrored}
    assert not (Path(places[0]) / "steps" / step.name / PART).exists()


def test_only_the_coordinator_writes_the_manifest_at_the_root(places):
    save(places, [0])
    step = one(places, "tier", "steps/step-00000000.w0001")
    names = tuple(path.name for path in step.iterdir() if path.name != "MANIFEST.json")
    (step / PART).write_bytes(Part(names, coordinator=False).to_bytes())
    _done, left, _problems = mirror(places)
    assert [item.name for item in left] == [step.name]
    assert len(list(Path(places[0]).glob("steps/.tmp-*/*"))) == len(names)
    assert not list(Path(places[0]).glob("steps/step-*"))


def test_part_and_session_read_back_and_refuse_what_is_damaged(tmp_path):
    chunk = Chunk((0,), (2,), "shard-00000-of-00002.safetensors", 64, 72)
    part = Part(("a", "b"), coordinator=True, copies=(("optim.w.step", chunk),))
    data = part.to_bytes()
    assert Part.from_bytes(data, "x") == part
    for position in range(0, len(data), 5):
        broken = bytearray(data)
        broken[position] ^= 1
        with pytest.raises(DamagedError):
            Part.from_bytes(bytes(broken), "x")
    storage = PosixStorage(tmp_path)
    assert Session.load(storage) is None
    keep = Retention(latest=2, every=5, best=3, metric="reward", mode="min")
    session = Session.begin("b" * 24, "s3://bucket/run", "run", keep)
    session.save(storage)
    assert Session.load(storage) == session
    assert session.nonce == "b" * 24


def test_a_copy_outside_its_file_is_not_followed(places):
    save(places, [0])
    step = one(places, "tier", "steps/step-00000000.w0001")
    [shard] = step.glob("shard-*")
    chunk = Chunk((), (), shard.name, 10**9, 10**9 + 4)
    part = Part(("state.json", shard.name), coordinator=True, copies=(("optim.a.step", chunk),))
    (step / PART).write_bytes(part.to_bytes())
    with pytest.raises(NoCheckpoint, match=r"a copy of optim.a.step lies outside"):
        restored(places)


def test_a_heartbeat_keeps_its_length_and_a_torn_one_is_no_news(tmp_path):
    (tmp_path / "mirror").mkdir()
    assert read_beat(tmp_path) is None
    sizes = set()
    for problem in (None, "x" * 10_000, 'quote"' * 500):
        write_beat(tmp_path, Beat(7, "s", "retrying", queue=3, problem=problem))
        beat = read_beat(tmp_path)
        assert (beat.pid, beat.queue, beat.state) == (7, 3, "retrying")
        assert beat.age < 60
        sizes.add((tmp_path / "mirror/uploader.json").stat().st_size)
    assert len(sizes) == 1
    good = (tmp_path / "mirror/uploader.json").read_text()
    for bad in ('{"pid": 7, "se', "[]", '{"pid": 7}', good.replace('"pid": 7', '"pid": "7"')):
        (tmp_path / "mirror/uploader.json").write_text(bad)
        assert read_beat(tmp_path) is None


def test_marks_name_steps_and_versions_only():
    for name in ("step-00000042.w0003", "run-7-v00000042"):
        assert parse_mark(f"{name}.mirrored") == (name, "mirrored")
    for foreign in ("uploader.json", "x.mirrored", "step-1.w1.mirrored", "step-00000042.w0003"):
        assert parse_mark(foreign) is None


def _hold(path, link):
    lock = FileLock.take(path)
    link.send(lock is not None)  # written when this returns, unlike an item of a Queue
    child = os.fork()  # as a data loader's worker: it must not keep the lock alive
    if child == 0:
        link.poll(120)  # also returns when the test is gone
        os._exit(0)
    os._exit(0)


def test_a_lock_dies_with_its_holder_even_if_a_forked_child_lives_on(tmp_path):
    context = multiprocessing.get_context("spawn")
    link, theirs = context.Pipe()
    holder = context.Process(target=_hold, args=(tmp_path / "lock", theirs))
    holder.start()
    assert link.poll(60)
    assert link.recv()
    taken = []
    wait_for(lambda: taken.append(FileLock.take(tmp_path / "lock")) or taken[-1])
    lock = taken[-1]
    link.send("stop")
    holder.join(60)
    assert FileLock.take(tmp_path / "lock") is None
    lock.release()
    shared = [FileLock.take(tmp_path / "lock", shared=True) for _ in range(2)]
    assert all(shared)
    assert FileLock.take(tmp_path / "lock") is None


class _Full(EvictingStorage):
    """A store that is full until something was evicted often enough."""

    def __init__(self, root, room):
        super().__init__(root, self._drop, lambda: "nothing may go")
        self.room = room
        self.dropped = 0

    def _drop(self):
        self.dropped += 1
        self.room -= 1
        return self.room >= 0

    def _replace(self, target, fill):
        if self.room > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super()._replace(target, fill)


def test_a_write_is_repeated_as_long_as_room_can_be_made(tmp_path):
    store = _Full(tmp_path, room=3)
    store.put("a", b"x")
    assert (store.dropped, store.read("a")) == (3, b"x")
    store = _Full(tmp_path, room=1)
    store._evict = lambda: False
    with pytest.raises(StorageError, match="No space left on device; nothing may go") as failed:
        store.put("b", b"x")
    assert failed.value.errno == errno.ENOSPC
    assert not store.exists("b")
    with pytest.raises(StorageError, match="nothing may go"):
        store.put_stream("b", [b"x"], 1)


def test_a_stream_gets_its_room_beforehand(tmp_path, monkeypatch):
    store = _Full(tmp_path, room=0)
    free = itertools.chain([0, 5], itertools.repeat(100))
    monkeypatch.setattr(store, "_free", lambda: next(free))
    evicted = []
    store._evict = lambda: evicted.append(1) or True
    store.put_stream("a", [b"0123456789"], 10)
    assert len(evicted) == 2
    assert store.read("a") == b"0123456789"


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    store = _Full(tmp_path, room=0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("")
    with pytest.raises(StorageError, match="write failed"):
        store.put("a", b"x")
    assert store.dropped == 0


def test_a_manifest_whose_fate_is_open_is_settled_by_the_next_try(places, monkeypatch):
    """The root takes the step and its answer is lost: it is found there, and not sent again."""
    digests = save(places, [0])
    moved = PosixStorage.rename_dir

    def answer_lost(self, source, target):
        moved(self, source, target)
        raise StorageError("the answer was lost")

    with monkeypatch.context() as patch:
        patch.setattr(PosixStorage, "rename_dir", answer_lost)
        with pytest.raises(CommitUnknown, match="step 0 is visible"):
            mirror(places)
    remote, tier = places
    assert [item.pair for item in Tier(tier, open_storage(remote).url).queue()] == [(0, 1)]
    shard = one(places, "remote", "steps/step-*/shard-*")
    before = shard.stat().st_ino
    done, waiting, problems = mirror(places)
    assert (list(done.values()), waiting, problems) == ([Outcome.mirrored], [], [])
    assert shard.stat().st_ino == before
    shutil.rmtree(tier)
    assert restored(places)[::2] == (0, digests[0])
