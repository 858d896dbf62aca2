"""Local tiers under real faults: uploaders and trainers are killed, disks fill up, writers race."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ranks_tiers
from support.ranks_tiers import flip, uploader_pid, wait_for
from support.spawn import run_ranks
from support.tiny_run import Run

from ckpt import CheckpointManager, Retention, SaveAborted, Superseded, VoteTimeout
from ckpt.catalog import list_steps
from ckpt.session import OPTIONS_VARIABLE, read_beat
from ckpt.storage import faultpoints, open_storage
from ckpt.supervisor import Supervisor
from ckpt.tier import Tier

FULL = os.environ.get("CKPT_FAULTS") == "full"
SECONDS = 60.0


def sampled(*params, also=()):
    """``params`` always, and ``also`` in a full run."""
    more = [pytest.param(*p.values, marks=[*p.marks, full_only]) for p in also]
    return [*params, *more]


full_only = pytest.mark.skipif(not FULL, reason="only with CKPT_FAULTS=full")


@pytest.fixture(autouse=True)
def _this_process_is_spared():
    """The variable is read once in a process; what the tests put there is for uploaders."""
    faultpoints.forget()
    faultpoints.hit("upload.idle")


POSIX = pytest.param("posix")
S3 = pytest.param("s3", marks=pytest.mark.s3)


@pytest.fixture
def remote(request, tmp_path):
    """A root: a directory, or a prefix on an S3 server."""
    if request.param == "posix":
        return str(tmp_path / "remote")
    return request.getfixturevalue("s3").url()


@pytest.fixture
def tier_path(tmp_path):
    """A tier whose uploader has ended when the test has: none may outlive its directory."""
    path = tmp_path / "tier"
    yield path
    beat = read_beat(path)
    if beat is not None and beat.state != "ended":
        with_pid = Path(f"/proc/{beat.pid}/cmdline")
        if with_pid.exists() and b"ckpt.upload" in with_pid.read_bytes():
            os.kill(beat.pid, signal.SIGKILL)


def saved(manager, run, steps):
    """Train and save; the state's digest after each step."""
    digests = {}
    for step in steps:
        run.step()
        manager.save(step, run.state)
        digests[step] = run.digest()
    manager.wait()
    return digests


def steps_at(url):
    return [entry.step for entry in list_steps(open_storage(url)) if entry.state == "committed"]


def assert_restores(url, step, digest, **kw):
    run = Run(seed=9)
    with CheckpointManager(url, **kw) as manager:
        assert manager.restore(run.state) == step
        assert manager.last_restore.damaged == ()
        assert run.digest() == digest


@pytest.mark.parametrize("remote", sampled(S3, also=[POSIX]), indirect=True)
@pytest.mark.parametrize(
    "point",
    sampled(
        pytest.param("upload.mid_file:2"),
        also=map(pytest.param, (*faultpoints.UPLOAD_POINTS, *faultpoints.COMMIT_POINTS)),
    ),
)
def test_an_uploader_killed_at_any_point_is_restarted_and_finishes(
    remote, tier_path, monkeypatch, point
):
    monkeypatch.setenv(faultpoints.ENVIRONMENT, f"{point}=kill")
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        first = uploader_pid(str(tier_path))
        monkeypatch.delenv(faultpoints.ENVIRONMENT)  # the next one is spared
        manager.restore(run.state)
        digests = saved(manager, run, range(2))
        manager.wait_mirrored(SECONDS)
        wait_for(lambda: read_beat(tier_path).pid != first)
    assert steps_at(remote) == [0, 1]
    assert_restores(remote, 1, digests[1])


def test_what_a_killed_uploader_left_is_no_step_at_the_root(tier_path, tmp_path, monkeypatch):
    """In between there is nothing to restore: the manifest comes last."""
    remote = str(tmp_path / "remote")
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "upload.before_commit=hang")
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        manager.restore(run.state)
        digests = saved(manager, run, [0])
        wait_for(lambda: len(list(Path(remote).glob("steps/.tmp-*/*"))) == 2)
        assert steps_at(remote) == []
        with pytest.raises(VoteTimeout, match=r"step-00000000.w0001 not mirrored"):
            manager.wait_mirrored(0.1)
        monkeypatch.delenv(faultpoints.ENVIRONMENT)
        os.kill(uploader_pid(str(tier_path)), signal.SIGKILL)
        manager.wait_mirrored(SECONDS)
    assert_restores(remote, 0, digests[0])


def test_an_uploader_that_hangs_is_replaced(tier_path, tmp_path, monkeypatch):
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "upload.mid_file=hang")
    run = Run()
    with CheckpointManager(tmp_path / "remote", local_tier=tier_path) as manager:
        first = uploader_pid(str(tier_path))
        monkeypatch.delenv(faultpoints.ENVIRONMENT)
        manager.restore(run.state)
        saved(manager, run, [0])
        wait_for(lambda: read_beat(tier_path).state == "uploading")
        with monkeypatch.context() as patient:
            patient.setattr("ckpt.supervisor.STUCK_SECONDS", 2.0)
            wait_for(lambda: not Path(f"/proc/{first}/fd").exists())
        manager.wait_mirrored(SECONDS)
    assert steps_at(tmp_path / "remote") == [0]


@pytest.mark.parametrize("remote", sampled(S3, also=[POSIX]), indirect=True)
def test_the_uploader_finishes_the_queue_of_a_killed_trainer_and_ends(remote, tier_path):
    args = (remote, str(tier_path), 3, None)
    run_ranks(1, ranks_tiers.save_and_die, *args, killed=(0,))
    tier = Tier(tier_path, open_storage(remote).url)
    assert not tier.trainer_alive()
    wait_for(lambda: not tier.queue())
    wait_for(lambda: not tier.uploader_alive())
    assert read_beat(tier_path).state == "ended"
    assert steps_at(remote) == [0, 1, 2]


def test_the_next_start_goes_on_where_trainer_and_uploader_died(tier_path, tmp_path, monkeypatch):
    remote = str(tmp_path / "remote")
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "upload.mid_file:2=hang")
    args = (remote, str(tier_path), 2, "steps/.tmp-*/shard-*")
    run_ranks(1, ranks_tiers.save_and_die, *args, killed=(0,))
    os.kill(uploader_pid(str(tier_path)), signal.SIGKILL)
    wait_for(lambda: not Tier(tier_path, remote).uploader_alive())
    assert steps_at(remote) == []
    [shard] = Path(remote).glob("steps/.tmp-*/shard-*")
    before = shard.stat().st_ino
    monkeypatch.delenv(faultpoints.ENVIRONMENT)
    run = Run(seed=4)
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        assert manager.restore(run.state) == 1
        assert manager.last_restore.local
        digest = run.digest()
        manager.wait_mirrored(SECONDS)
    [shard] = Path(remote).glob("steps/step-00000000.w0001/shard-*")
    assert shard.stat().st_ino == before, "what was up already is not sent again"
    assert_restores(remote, 1, digest)


def test_a_new_trainer_takes_over_from_the_uploader_of_a_dead_one(tier_path, tmp_path):
    """The old uploader finishes what it is at and leaves; two never work at the same time."""
    remote = str(tmp_path / "remote")
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        manager.restore(run.state)
        saved(manager, run, [0])
        first = uploader_pid(str(tier_path))
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        assert manager.restore(run.state) == 0
        digests = saved(manager, run, [1])
        manager.wait_mirrored(SECONDS)
        wait_for(lambda: read_beat(tier_path).pid != first)
    assert_restores(remote, 1, digests[1])


@pytest.mark.parametrize("remote", sampled(POSIX, also=[S3]), indirect=True)
def test_two_trainers_with_tiers_of_their_own_are_fenced_by_the_root(tmp_path, remote):
    """The second takes over; the first is told, and what it saved later never counts."""
    stale, run = Run(), Run(seed=5)
    first = CheckpointManager(remote, local_tier=tmp_path / "a")
    first.restore(stale.state)
    saved(first, stale, [0])
    first.wait_mirrored(SECONDS)
    with CheckpointManager(remote, local_tier=tmp_path / "b") as second:
        assert second.restore(run.state) == 0
        digests = saved(second, run, [1])
        second.wait_mirrored(SECONDS)
        saved(first, stale, [1])  # it cannot know yet: its tier is its own
        first.wait_mirrored(SECONDS)
        wait_for(lambda: first._tiers._supervisor.beat.superseded == 2)
        first.save(2, stale.state)
        with pytest.raises(Superseded, match="writer 2 has taken over"):
            first.wait()
        first.close()
    assert_restores(remote, 1, digests[1])
    assert {e.epoch for e in list_steps(open_storage(remote)) if e.step == 1} == {2}


@pytest.mark.s3
def test_credentials_reach_the_uploader_by_its_environment_alone(s3, tier_path, monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    secret, url, run = s3.storage_options["secret"], s3.url(), Run()
    with CheckpointManager(
        url, local_tier=tier_path, storage_options=s3.storage_options
    ) as manager:
        manager.restore(run.state)
        saved(manager, run, [0])
        pid = uploader_pid(str(tier_path))
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        manager.wait_mirrored(SECONDS)
    assert b"ckpt.upload" in command
    assert secret.encode() not in command
    assert f"{OPTIONS_VARIABLE}=".encode() in environment
    assert secret.encode() in environment
    for file in filter(Path.is_file, tier_path.rglob("*")):
        assert secret.encode() not in file.read_bytes(), file


def test_the_uploader_has_nothing_of_the_trainer(tier_path, tmp_path):
    """No descriptor (a socket or a GPU would stay open after the trainer), and its own session."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    pipe = str(Path(f"/proc/self/fd/{writer}").readlink())
    run = Run()
    try:
        with CheckpointManager(tmp_path / "remote", local_tier=tier_path) as manager:
            manager.restore(run.state)
            saved(manager, run, [0])
            pid = uploader_pid(str(tier_path))
            descriptors = Path(f"/proc/{pid}/fd").iterdir()
            assert pipe not in {str(descriptor.readlink()) for descriptor in descriptors}
            assert os.getsid(pid) == pid
            manager.wait_mirrored(SECONDS)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 256 KiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    place = tmp_path / "small"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_tier_drops_what_is_mirrored_and_never_what_is_not(small_disk, tmp_path):
    remote, place = str(tmp_path / "remote"), small_disk / "tier"
    tier = Tier(place, remote)
    lock = tier.hold_uploader()  # nothing is mirrored while the test has it
    run = Run()
    manager = CheckpointManager(remote, local_tier=place, retention=Retention(latest=99))
    manager.restore(run.state)
    digests = {}

    def save_until_full():
        for step in range(99):
            run.step()
            manager.save(step, run.state).wait()
            digests[step] = run.digest()

    with pytest.raises(SaveAborted, match="never dropped") as failed:
        save_until_full()
    with pytest.raises(SaveAborted, match="is full"):
        manager.wait()
    full = len(digests)
    assert full >= 2
    assert "is full" in str(failed.value)
    assert f"{full} step(s) or version(s)" in str(failed.value)
    assert [item.pair[0] for item in tier.steps()] == list(range(full)), "nothing was dropped"
    lock.release()
    manager.wait_mirrored(SECONDS)
    for step in range(full, full + 3):
        run.step()
        manager.save(step, run.state)
        manager.wait()
        digests[step] = run.digest()
    left = [item.pair[0] for item in tier.steps()]
    assert left == list(range(left[0], full + 3)), "the oldest went first"
    assert left[0] > 0
    manager.wait_mirrored(SECONDS)
    manager.close()
    wait_for(lambda: not tier.uploader_alive())
    assert steps_at(remote) == list(range(full + 3))
    for step in (0, full + 2):
        again = Run(seed=8)
        with CheckpointManager(remote) as reader:
            assert reader.restore(again.state, step=step) == step
            assert again.digest() == digests[step]


def test_a_supervisor_cannot_be_fooled_by_a_stale_heartbeat(tier_path, tmp_path):
    """What counts is the lock, which the system takes from the dead: not the file, not the pid."""
    remote = str(tmp_path / "remote")
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        manager.restore(run.state)
        saved(manager, run, [0])
        manager.wait_mirrored(SECONDS)
    tier = Tier(tier_path, remote)
    wait_for(lambda: not tier.uploader_alive())
    text = (tier_path / "mirror/uploader.json").read_text()
    pid = read_beat(tier_path).pid
    (tier_path / "mirror/uploader.json").write_text(
        text.replace('"ended"', '"idle"').replace(str(pid), str(os.getpid()))
    )
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        assert manager.restore(run.state) == 0
        saved(manager, run, [1])
        manager.wait_mirrored(SECONDS)


def test_damage_in_the_tier_stays_there(tier_path, tmp_path):
    """A flipped bit is found while the file is read, before anything is visible at the root."""
    remote, run = str(tmp_path / "remote"), Run()
    tier = Tier(tier_path, remote)
    lock = tier.hold_uploader()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        manager.restore(run.state)
        digests = saved(manager, run, range(2))
        flip(next(tier_path.glob("steps/step-00000001*/shard-*")))
        lock.release()
        with pytest.raises(ValueError, match=r"step-00000001.w0001 in .* damaged"):
            manager.wait_mirrored(SECONDS)
    assert_restores(remote, 0, digests[0])
    assert not list(Path(remote).glob("steps/*/.tmp-*"))
    assert tier.steps()[-1].pair == (1, 1), "kept for whoever wants to look at it"


def test_by_hand(tier_path, tmp_path, monkeypatch):
    """``ckpt mirror`` finishes the queue of a trainer that is gone for good."""
    remote = str(tmp_path / "remote")
    monkeypatch.setattr(Supervisor, "_start", lambda self: None)
    run = Run()
    with CheckpointManager(remote, local_tier=tier_path) as manager:
        manager.restore(run.state)
        digests = saved(manager, run, range(2))
    command = [sys.executable, "-m", "ckpt.cli", "mirror", remote, str(tier_path)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "2 mirrored" in done.stdout
    assert time.monotonic() - began < SECONDS
    assert_restores(remote, 1, digests[1])
