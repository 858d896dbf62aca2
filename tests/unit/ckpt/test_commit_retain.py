"""Writer epochs, the commit, and what retention may delete; on both kinds of store."""

from __future__ import annotations

import random

import pytest
from support.tiny_run import Run

from ckpt import CheckpointManager, CommitUnknown, Retention, StepExists, Superseded, UnrestoredRoot
from ckpt.commit import Parent, check_current, claim_epoch, commit_step, newest_epoch, place
from ckpt.envelope import utc_now
from ckpt.manifest import StepManifest
from ckpt.retain import Keeper, surplus
from ckpt.storage import faultpoints, open_storage


@pytest.fixture(params=["posix", "memory"])
def storage(request, tmp_path):
    if request.param == "posix":
        return open_storage(tmp_path / "root")
    return open_storage(f"memory://{tmp_path.name}-{random.SystemRandom().getrandbits(64)}")


def manifest(step, epoch, attempt):
    return StepManifest(
        step=step,
        epoch=epoch,
        attempt=attempt,
        created=utc_now(),
        writer_version="0",
        world_size=1,
        mesh=None,
        fingerprint="f",
        base=None,
        export=None,
        tensors=(),
        files=(),
        adapter_sha256=None,
        policy_version=None,
    )


def make_step(storage, step, epoch, attempt="abcd"):
    where = place(storage, step, epoch, attempt)
    storage.put(where.path("data"), b"x")
    commit_step(storage, where, manifest(step, epoch, attempt))
    return where


def test_epochs_count_up_and_name_their_parent(storage):
    first = claim_epoch(storage, None, seen=None, fresh=False)
    assert (first.epoch, first.parent_epoch) == (1, None)
    make_step(storage, 4, 1)
    second = claim_epoch(storage, Parent(1, 4), seen=1, fresh=False)
    assert (second.epoch, second.parent_epoch, second.parent_step) == (2, 1, 4)
    assert newest_epoch(storage) == 2


def test_a_root_with_steps_needs_a_restore_or_a_fresh_start(storage):
    claim_epoch(storage, None, seen=None, fresh=False)
    make_step(storage, 4, 1)
    with pytest.raises(UnrestoredRoot, match=r"up to 4"):
        claim_epoch(storage, None, seen=None, fresh=False)
    assert newest_epoch(storage) == 1
    assert claim_epoch(storage, None, seen=None, fresh=True).epoch == 2


def test_steps_of_a_lost_writer_record_are_not_taken_over(storage):
    make_step(storage, 4, 7)
    assert claim_epoch(storage, None, seen=0, fresh=False).epoch == 8


def test_a_newer_writer_stops_claims_and_commits(storage):
    claim_epoch(storage, None, seen=0, fresh=False)
    claim_epoch(storage, None, seen=1, fresh=False)
    with pytest.raises(Superseded, match="writer 2 began"):
        claim_epoch(storage, None, seen=1, fresh=False)
    with pytest.raises(Superseded, match="this is writer 1"):
        check_current(storage, 1)
    with pytest.raises(Superseded):
        make_step(storage, 5, 1)
    assert not [e for e in storage.list("steps") if storage.exists(f"steps/{e.name}/MANIFEST.json")]


def test_a_committed_step_is_never_replaced(storage):
    make_step(storage, 5, 1)
    before = storage.read("steps/step-00000005.w0001/MANIFEST.json")
    with pytest.raises(StepExists, match="step 5 of writer 1"):
        make_step(storage, 5, 1, attempt="efgh")
    assert storage.read("steps/step-00000005.w0001/MANIFEST.json") == before


def test_an_error_after_the_manifest_is_visible_is_no_abort(storage, monkeypatch):
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "commit.after_manifest=raise")
    faultpoints.forget()
    try:
        with pytest.raises(CommitUnknown, match="step 5 is visible"):
            make_step(storage, 5, 1)
    finally:
        monkeypatch.delenv(faultpoints.ENVIRONMENT)
        faultpoints.forget()
    assert storage.exists("steps/step-00000005.w0001/MANIFEST.json")


@pytest.mark.parametrize(
    ("keep", "lineage", "abandoned", "victims"),
    [
        (Retention(latest=1), [3, 2, 1], [], [2, 1]),
        (Retention(latest=2), [3, 2, 1], [], [1]),
        (Retention(latest=5), [3, 2, 1], [9], []),  # not yet enough steps: nothing goes
        (Retention(latest=1, every=2), [5, 4, 3, 2, 0], [], [3]),
        (Retention(latest=1), [3], [8, 7], [7, 8]),
        (Retention(latest=1), [], [8], []),
    ],
)
def test_what_goes(keep, lineage, abandoned, victims):
    pairs = [(step, 2) for step in lineage]
    old = [(step, 1) for step in abandoned]
    found = surplus(pairs, old, keep)
    assert [step for step, _epoch in found] == victims
    assert not pairs or pairs[0] not in found


def test_damaged_steps_do_not_count_and_foreign_names_stay(storage):
    claim_epoch(storage, None, seen=0, fresh=False)
    for step in range(5):
        make_step(storage, step, 1)
    newest = "steps/step-00000004.w0001/MANIFEST.json"
    storage.put(newest, storage.read(newest)[:-5])
    storage.put("steps/notes.txt", b"mine")
    storage.put("steps/step-1/readme", b"mine")
    Keeper(storage, Retention(latest=2), "run").prune_steps(1)
    names = [entry.name for entry in storage.list("steps")]
    assert names == [
        "notes.txt",
        "step-00000002.w0001",
        "step-00000003.w0001",
        "step-00000004.w0001",  # damaged: neither counted nor deleted
        "step-1",
    ]


def test_the_sweep_takes_only_dead_work(storage):
    claim_epoch(storage, None, seen=0, fresh=False)
    make_step(storage, 1, 1)
    claim_epoch(storage, Parent(1, 1), seen=1, fresh=False)
    make_step(storage, 2, 2, attempt="mine0001")
    unfinished = place(storage, 3, 1, "dead0000")
    storage.put(unfinished.path("shard"), b"x")
    mine = place(storage, 4, 2, "mine0002")
    storage.put(mine.path("shard"), b"x")
    storage.put("adapters/.parts-dead0000/x", b"x")
    storage.put("adapters/.parts-mine0002/x", b"x")
    storage.put("adapters/other/x", b"x")
    keeper = Keeper(storage, Retention(), "run")
    keeper.sweep(1, "mine")  # a newer writer exists: nothing is ours to sweep
    assert storage.exists(unfinished.path("shard"))
    keeper.sweep(2, "mine")
    assert not storage.exists(unfinished.path("shard"))
    assert storage.exists(mine.path("shard"))
    assert [e.name for e in storage.list("adapters")] == [".parts-mine0002", "other"]
    for committed in ("step-00000001.w0001", "step-00000002.w0002"):
        assert storage.exists(f"steps/{committed}/MANIFEST.json")


def test_a_store_that_cannot_delete_costs_no_commit(tmp_path, monkeypatch, caplog):
    from ckpt.errors import StorageError

    run = Run()
    with CheckpointManager(tmp_path, retention=Retention(latest=1)) as manager:

        def refuse(*_args):
            msg = "read-only"
            raise StorageError(msg)

        monkeypatch.setattr(manager._storage, "delete_tree", refuse)
        for step in range(3):
            manager.save(step, run.state)
        manager.wait()
        assert 2 in manager.steps()
    assert "retention of steps failed" in caplog.text
