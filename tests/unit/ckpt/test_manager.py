"""CheckpointManager in one process: what it promises to a trainer."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import TimeoutError as FutureTimeout

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.tiny_run import EXPORT, Run, Tiny

from ckpt import (
    BaseIdentity,
    BaseMismatch,
    CheckpointManager,
    ConfigError,
    DamagedError,
    NoCheckpoint,
    PublishError,
    Retention,
    SaveAborted,
    StateError,
    StepExists,
    Superseded,
    TrainState,
    UnrestoredRoot,
)
from ckpt.storage import faultpoints, open_storage
from ckpt.vote import Board


@pytest.fixture(params=["posix", "memory"])
def root(request, tmp_path):
    """A root with renames, and one with the object-store protocol."""
    if request.param == "posix":
        yield str(tmp_path / "root")
        return
    url = f"memory://{tmp_path.name}-{random.SystemRandom().getrandbits(64)}"
    yield url
    open_storage(url).delete_tree("steps")


def save_all(manager, run, steps):
    digests = {}
    for step in steps:
        run.step()
        manager.save(step, run.state)
        digests[step] = run.digest()
    manager.wait()
    return digests


def test_resume_is_exact(root):
    whole = Run().train(6)
    run = Run()
    with CheckpointManager(root) as manager:
        assert manager.restore(run.state) is None
        first = run.train(3)
        manager.save(2, run.state)
    resumed = Run(seed=99)
    with CheckpointManager(root) as manager:
        assert manager.restore(resumed.state) == 2
        assert resumed.state.extra == {"policy_version": 3}
        assert resumed.cursor.position == 3
        assert first + resumed.train(3) == whole


def test_a_restore_stages_in_the_slots_and_leaves_them_fit_for_saves(tmp_path, monkeypatch):
    monkeypatch.setattr("ckpt.fetch._memory", lambda size: pytest.fail("fresh memory"))
    run = Run()
    with CheckpointManager(tmp_path) as manager:
        want = save_all(manager, run, range(2))
        run.step()
        assert manager.restore(run.state) == 1
        assert run.digest() == want[1]
        want = save_all(manager, run, [2, 3])
    monkeypatch.undo()
    again = Run(seed=1)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(again.state) == 3
        assert again.digest() == want[3]
    for step in (tmp_path / "steps").iterdir():
        for shard in step.glob("*.safetensors"):
            load_file(shard)


def test_the_snapshot_is_that_of_the_call(root, monkeypatch):
    """Whatever training does right after save() returned is not in the checkpoint."""
    run = Run()
    gate = threading.Event()
    with CheckpointManager(root) as manager:
        original = manager._pipeline.run
        monkeypatch.setattr(manager._pipeline, "run", lambda job: (gate.wait(30), original(job)))
        run.step()
        want = run.digest()
        manager.save(0, run.state)
        run.train(2)
        run.state.extra["policy_version"] = 77
        gate.set()
    again = Run(seed=2)
    with CheckpointManager(root) as manager:
        manager.restore(again.state)
    assert again.digest() == want
    assert again.state.extra == {"policy_version": 1}
    assert again.cursor.position == 1


def test_after_the_first_save_the_callers_thread_touches_no_store(root, monkeypatch):
    run = Run()
    calls = []
    with CheckpointManager(root) as manager:
        storage = manager._storage
        run.step()
        manager.save(0, run.state).wait()
        for name in ("read", "read_into", "size", "exists", "list", "put", "put_new", "delete"):
            original = getattr(storage, name)

            def spy(*args, _original=original, _name=name, **kwargs):
                calls.append((_name, threading.current_thread()))
                return _original(*args, **kwargs)

            monkeypatch.setattr(storage, name, spy)
        for name in ("_put", "_get", "_check"):
            original = getattr(Board, name)

            def note(self, *args, _original=original, _name=name):
                calls.append((_name, threading.current_thread()))
                return _original(self, *args)

            monkeypatch.setattr(Board, name, note)
        run.step()
        handle = manager.save(1, run.state)
        handle.wait()
        assert not handle.metrics.planned
    assert "put" in {name for name, _thread in calls}
    assert threading.main_thread() not in {thread for _name, thread in calls}


def test_slots_are_reused_and_block_when_both_are_busy(tmp_path, monkeypatch):
    run = Run()
    gate = threading.Event()
    started = []
    with CheckpointManager(tmp_path, retention=Retention(latest=9)) as manager:
        run.step()
        manager.save(0, run.state).wait()
        original = manager._pipeline.run

        def slow(job):
            started.append(job.step)
            assert gate.wait(30)
            original(job)

        monkeypatch.setattr(manager._pipeline, "run", slow)
        manager.save(1, run.state)
        manager.save(2, run.state)
        third = threading.Thread(target=lambda: manager.save(3, run.state))
        third.start()
        third.join(0.3)
        assert third.is_alive(), "both slots are in use"
        gate.set()
        third.join(30)
        manager.wait()
        assert started == [1, 2, 3]
        assert manager.steps() == [0, 1, 2, 3]


def test_a_shard_is_a_safetensors_file_of_the_values(tmp_path):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(5, run.state)
    (shard,) = tmp_path.glob("steps/step-00000005.w0001/shard-*.safetensors")
    stored = load_file(shard)
    live = run.state.live().tensors
    assert stored.keys() == live.keys()
    assert {"model.a", "model.b", "model.steps", "optim.a.exp_avg", "optim.b.step"} <= set(stored)
    assert "model.base" not in stored
    for name, tensor in live.items():
        assert torch.equal(stored[name], tensor)


def test_state_json_is_plain_json_without_weights(tmp_path):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state)
    (path,) = tmp_path.glob("steps/*/state.json")
    document = json.loads(path.read_bytes())
    groups = document["value"]["shared"]["optimizer"]["groups"]
    assert [group["params"] for group in groups] == [["a"], ["b"]]
    assert document["value"]["ranks"][0]["dataloader"] == {"rank": 0, "position": 1}


@pytest.mark.parametrize("which", ["MANIFEST.json", "state.json", "shard"])
def test_a_flipped_bit_in_any_file_gives_the_older_step(root, which, caplog):
    run = Run()
    with CheckpointManager(root, retention=Retention(latest=9)) as manager:
        digests = save_all(manager, run, range(3))
    storage = open_storage(root)
    (entry,) = [e for e in storage.list("steps") if e.name.startswith("step-00000002")]
    paths = [f"steps/{entry.name}/{e.name}" for e in storage.list(f"steps/{entry.name}")]
    if not storage.has_rename:
        (folder,) = [p for p in paths if not p.endswith(".json")]
        paths = [p for p in paths if p != folder]
        paths += [f"{folder}/{e.name}" for e in storage.list(folder)]
    (path,) = [p for p in paths if which in p]
    whole = storage.read(path)
    for position in {0, 9, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        data = bytearray(whole)
        data[position] ^= 4
        storage.put(path, bytes(data))
        again = Run(seed=1)
        with CheckpointManager(root) as manager:
            assert manager.restore(again.state) == 1
            (damaged,) = manager.last_restore.damaged
        assert (damaged.step, damaged.epoch) == (2, 1)
        assert again.digest() == digests[1]
        assert "step 2" in caplog.text
        with CheckpointManager(root) as manager, pytest.raises(DamagedError):
            manager.restore(Run().state, step=2)


def test_missing_and_short_files_give_the_older_step(tmp_path):
    run = Run()
    with CheckpointManager(tmp_path) as manager:
        digests = save_all(manager, run, range(3))
    (shard,) = tmp_path.glob("steps/step-00000002*/shard-*")
    shard.unlink()
    (state,) = tmp_path.glob("steps/step-00000001*/state.json")
    state.write_bytes(state.read_bytes()[:-1])
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(run.state) == 0
        assert [entry.step for entry in manager.last_restore.damaged] == [2, 1]
    assert run.digest() == digests[0]


def test_no_whole_step_is_an_error_not_a_fresh_start(tmp_path):
    run = Run()
    with CheckpointManager(tmp_path) as manager:
        save_all(manager, run, range(2))
    for path in tmp_path.glob("steps/*/state.json"):
        path.unlink()
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(NoCheckpoint, match=r"none of the 2 step\(s\) verifies"):
            manager.restore(run.state)
        with pytest.raises(UnrestoredRoot):
            manager.save(9, run.state)


def test_restoring_one_step_by_number_starts_a_branch(root):
    run = Run()
    with CheckpointManager(root, retention=Retention(latest=9)) as manager:
        digests = save_all(manager, run, range(4))
        assert manager.restore(run.state, step=1) == 1
        assert run.digest() == digests[1]
        run.step()
        manager.save(2, run.state).wait()
        branch = run.digest()
        assert manager.steps() == [0, 1, 2]
    again = Run(seed=1)
    with CheckpointManager(root) as manager:
        assert manager.restore(again.state) == 2
        assert manager.last_restore.epoch == 2
        assert again.digest() == branch
        with pytest.raises(NoCheckpoint, match="abandoned"):
            manager.restore(again.state, step=3)
        with pytest.raises(NoCheckpoint, match="newest steps: 2, 1, 0"):
            manager.restore(again.state, step=77)


def test_a_root_with_steps_must_be_restored_or_declared_fresh(root):
    run = Run()
    run.step()
    with CheckpointManager(root) as manager:
        manager.save(0, run.state)
    with CheckpointManager(root) as manager, pytest.raises(UnrestoredRoot, match="fresh=True"):
        manager.save(1, run.state)
    with CheckpointManager(root, fresh=True) as manager:
        manager.save(0, run.state).wait()
        assert manager.steps() == [0]
    with CheckpointManager(root) as manager:
        manager.restore(run.state)
        assert manager.last_restore.epoch == 2


def test_a_second_trainer_takes_over_and_the_first_is_told(root):
    first, second = Run(), Run(seed=8)
    one = CheckpointManager(root)
    one.restore(first.state)
    first.step()
    one.save(0, first.state).wait()
    with CheckpointManager(root) as two:
        assert two.restore(second.state) == 0
        second.step()
        two.save(1, second.state).wait()
        handle = one.save(1, first.state)
        assert isinstance(handle.committed.exception(30), Superseded)
        with pytest.raises(Superseded, match="writer 2 has taken over"):
            one.wait()
        with pytest.raises(PublishError, match="writer 2 has taken over"):
            one.publish(first.state).wait(30)
        second.step()
        two.save(2, second.state).wait()
        assert two.steps() == [0, 1, 2]
    with pytest.raises(PublishError):
        one.close()


def test_a_writer_that_restored_before_another_began_may_not_start(root):
    run = Run()
    run.step()
    with CheckpointManager(root) as manager:
        manager.save(0, run.state)
    late, early = CheckpointManager(root), CheckpointManager(root)
    late.restore(run.state)
    early.restore(run.state)
    early.save(1, run.state).wait()
    with pytest.raises(Superseded, match="after this one restored"):
        late.save(1, run.state)
    early.close()
    late.close()


def test_a_step_is_saved_once(root):
    run = Run()
    with CheckpointManager(root) as manager:
        run.step()
        manager.save(3, run.state)
        with pytest.raises(StepExists, match="step 3"):
            manager.save(3, run.state)
        manager.wait()


def test_a_failed_save_surfaces_once_and_may_be_repeated(tmp_path, monkeypatch):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state).wait()
        monkeypatch.setenv(faultpoints.ENVIRONMENT, "posix.put.mid_write=raise")
        faultpoints.forget()
        handle = manager.save(1, run.state)
        with pytest.raises(SaveAborted, match="save of step 1 aborted: rank 0: StorageError"):
            manager.wait()
        assert isinstance(handle.committed.exception(1), SaveAborted)
        assert isinstance(handle.published.exception(1), SaveAborted)
        monkeypatch.delenv(faultpoints.ENVIRONMENT)
        faultpoints.forget()
        manager.wait()  # raised once
        manager.save(1, run.state)
    assert [path.name for path in sorted(tmp_path.glob("steps/*"))] == [
        "step-00000000.w0001",
        "step-00000001.w0001",
    ]


@pytest.mark.parametrize("call", ["save", "publish", "restore", "close"])
def test_a_background_error_reaches_whatever_call_comes_next(tmp_path, monkeypatch, call):
    run = Run()
    run.step()
    manager = CheckpointManager(tmp_path)
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "commit.before_manifest=raise")
    faultpoints.forget()
    handle = manager.save(0, run.state)
    handle.committed.exception(30)
    monkeypatch.delenv(faultpoints.ENVIRONMENT)
    faultpoints.forget()
    calls = {
        "save": lambda: manager.save(1, run.state),
        "publish": lambda: manager.publish(run.state),
        "restore": lambda: manager.restore(run.state),
        "close": manager.close,
    }
    with pytest.raises(SaveAborted, match="injected fault"):
        calls[call]()
    manager.close()


def test_restore_names_what_does_not_fit_and_touches_nothing(tmp_path):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state)
    other = Run()
    other.model.more = torch.nn.Parameter(torch.zeros(1))
    before = other.digest()
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(StateError, match=r"the checkpoint lacks model\.more"):
            manager.restore(other.state)
        assert other.digest() == before
        assert manager.restore(other.state, strict=False) == 0
        assert manager.last_restore.missing == ("model.more",)
    bare = TrainState(run.model, extra={})
    with (
        CheckpointManager(tmp_path) as manager,
        pytest.raises(StateError, match="only the checkpoint has optimizer"),
    ):
        manager.restore(bare)


def test_restore_refuses_shapes_dtypes_and_another_base(tmp_path):
    base = BaseIdentity("tiny", "a" * 64)
    run = Run()
    run.state.base = base
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state)
    with CheckpointManager(tmp_path) as manager:
        other = Run()
        other.model.a = torch.nn.Parameter(torch.zeros(4, 6))
        with pytest.raises(StateError, match=r"model\.a is F32 \[3, 6\].*F32 \[4, 6\] here"):
            manager.restore(TrainState(other.model), strict=False)
        with pytest.raises(StateError, match=r"model\.a is F32 .* BF16"):
            manager.restore(TrainState(Tiny().bfloat16()), strict=False)
        other = Run()
        other.state.base = BaseIdentity("tiny-2", "b" * 64)
        with pytest.raises(BaseMismatch, match="tiny-2"):
            manager.restore(other.state)


def test_publish_alone_and_with_a_step(root):
    run = Run()
    run.step()
    with CheckpointManager(root, run_name="r", publish_dtype="float32") as manager:
        first = manager.publish(run.state, step=0)
        second = manager.save(0, run.state, publish=True)
        assert first.committed.result(30) is None
        versions = [first.published.result(30), second.published.result(30)]
        assert manager.steps() == [0]
    assert [version.name for version in versions] == ["r-v00000001", "r-v00000002"]
    assert versions[0].adapter_sha256 == versions[1].adapter_sha256
    assert versions[0].policy_version == 1
    assert second.metrics.publish_lag_ms > 0


def test_a_probe_goes_into_the_versions_manifest_alone(root):
    run = Run()
    run.step()
    probe = {"token_ids": (1, 2), "logprobs": [-0.5]}
    with CheckpointManager(root, run_name="r") as manager:
        first = manager.publish(run.state, step=0, probe=probe)
        probe["logprobs"][0] = -9.0  # the manifest holds what was given, not what it became
        second = manager.save(0, run.state, publish=True, probe={"token_ids": [3]})
        third = manager.save(1, run.state, publish=True)
        versions = [handle.published.result(30).probe for handle in (first, second, third)]
        assert versions == [{"token_ids": [1, 2], "logprobs": [-0.5]}, {"token_ids": [3]}, None]
        with pytest.raises(ConfigError, match="publish=True"):
            manager.save(2, run.state, probe={"token_ids": [3]})
        with pytest.raises(ConfigError, match=r"probe\.logprobs: a Tensor"):
            manager.publish(run.state, probe={"logprobs": torch.zeros(1)})
        with pytest.raises(ConfigError, match="NaN"):
            manager.publish(run.state, probe={"logprobs": [float("nan")]})
        assert manager.save(2, run.state).committed.result(30) == 2


def test_a_failed_publish_keeps_the_step_and_surfaces(root):
    run = Run()
    run.step()
    with torch.no_grad():
        run.model.b[0, 0] = float("inf")
    with CheckpointManager(root) as manager:
        handle = manager.save(0, run.state, publish=True)
        with pytest.raises(PublishError, match="lora_B"):
            manager.wait()
        assert handle.committed.result(0) == 0
        assert isinstance(handle.published.exception(0), PublishError)
        assert manager.steps() == [0]


def test_publish_without_an_export_says_what_to_do(tmp_path):
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(ConfigError, match=r"apply_lora\(\)"):
            manager.publish(TrainState(Tiny()))
        with pytest.raises(ConfigError):
            manager.save(0, TrainState(Tiny()), publish=True)


def test_a_changed_layout_is_noticed_and_planned_again(tmp_path):
    run = Run()
    with CheckpointManager(tmp_path, retention=Retention(latest=9)) as manager:
        assert manager.save(0, run.state).metrics.planned  # no Adam tensors yet
        run.step()
        assert manager.save(1, run.state).metrics.planned
        assert not manager.save(2, run.state).metrics.planned
        # Equal tensors under new identities are the same layout.
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        assert not manager.save(3, run.state).metrics.planned
        want = run.digest()
    again = Run(seed=3)
    with CheckpointManager(tmp_path) as manager:
        assert manager.restore(again.state) == 3
        assert again.digest() == want
        # Step 0 was saved before Adam had any state: restoring it takes that away again.
        manager.restore(again.state, step=0)
        assert again.optimizer.state == {}


def test_another_shape_under_the_same_name_is_planned_again(tmp_path):
    model = Tiny()
    state = TrainState(model)
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, state)
        model.a = torch.nn.Parameter(torch.full((4, 6), 2.0))
        assert manager.save(1, state).metrics.planned
    with CheckpointManager(tmp_path) as manager:
        model.a = torch.nn.Parameter(torch.zeros(4, 6))
        assert manager.restore(state) == 1
    assert torch.equal(model.a, torch.full((4, 6), 2.0))


def test_a_tensor_swapped_behind_the_same_name_is_saved(tmp_path):
    run = Run()
    run.step()
    with CheckpointManager(tmp_path) as manager:
        manager.save(0, run.state)
        run.model.a.data = torch.full((3, 6), 5.0)
        manager.save(1, run.state)
    with CheckpointManager(tmp_path) as manager:
        manager.restore(Run().state)
        again = Run()
        manager.restore(again.state)
        assert torch.equal(again.model.a, torch.full((3, 6), 5.0))


def test_rank_state_of_another_topology_is_derived_and_said(tmp_path):
    run = Run()
    run.step()
    shared = run.state.shared_values(run.state.live())
    ranks = [{**run.state.rank_values(), "dataloader": {"position": n}} for n in (5, 6, 7)]
    streams = []
    for rank in (0, 1, 1):
        live = Run(seed=40)
        notes = live.state.apply_values(shared, ranks, {}, rank, 2)
        assert live.cursor.position == 5 + rank
        assert any("seed derived" in note for note in notes)
        assert any("continues from that of rank" in note for note in notes)
        streams.append((random.random(), np.random.rand(), torch.rand(3).tolist()))
    assert streams[1] == streams[2]
    assert all(a != b for a, b in zip(streams[0], streams[1], strict=True))


def test_metrics_and_their_callback(tmp_path):
    run = Run()
    run.step()
    seen = []
    with CheckpointManager(tmp_path, on_metrics=seen.append) as manager:
        manager.save(4, run.state, publish=True)
    (metrics,) = seen
    assert metrics.step == 4
    assert metrics.stage_bytes > 300
    for value in (metrics.stall_ms, metrics.write_ms, metrics.commit_ms, metrics.publish_ms):
        assert value > 0
    assert metrics.total_ms >= metrics.publish_lag_ms > metrics.commit_ms


def test_what_the_callback_raises_surfaces(tmp_path):
    def fail(_metrics):
        msg = "dashboard is down"
        raise RuntimeError(msg)

    run = Run()
    manager = CheckpointManager(tmp_path, on_metrics=fail)
    manager.save(0, run.state)
    with pytest.raises(RuntimeError, match="dashboard is down"):
        manager.wait()
    assert manager.steps() == [0]
    manager.close()


def test_arguments_are_checked(tmp_path):
    for bad in (
        {"run_name": "a/b"},
        {"run_name": "a" * 91},  # refused now, not at the first publish
        {"vote_timeout": 0},
        {"when_busy": "never"},
    ):
        with pytest.raises(ConfigError):
            CheckpointManager(tmp_path, **bad)
    with CheckpointManager(tmp_path) as manager:
        for step in (-1, 1.0, True, None):
            with pytest.raises(ConfigError):
                manager.save(step, Run().state)
        with pytest.raises(ConfigError):
            manager.publish(Run().state, step=-1)
    manager.close()  # twice is fine
    for call in (lambda: manager.save(0, Run().state), lambda: manager.restore(Run().state)):
        with pytest.raises(ConfigError, match="closed"):
            call()


def test_wait_has_a_deadline(tmp_path, monkeypatch):
    run = Run()
    gate = threading.Event()
    with CheckpointManager(tmp_path) as manager:
        original = manager._pipeline.run
        monkeypatch.setattr(manager._pipeline, "run", lambda job: (gate.wait(30), original(job)))
        handle = manager.save(0, run.state)
        handle.wait_staged(0)
        with pytest.raises(TimeoutError, match="still under way"):
            manager.wait(0.05)
        with pytest.raises((TimeoutError, FutureTimeout)):
            handle.wait(0.05)
        gate.set()


def test_an_error_in_the_with_block_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv(faultpoints.ENVIRONMENT, "commit.before_manifest=raise")
    faultpoints.forget()

    def fail():
        with CheckpointManager(tmp_path) as manager:
            manager.save(0, Run().state)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    monkeypatch.delenv(faultpoints.ENVIRONMENT)
    faultpoints.forget()
    assert "the checkpoint manager also failed" in caught.value.__notes__[0]


def test_retention_keeps_latest_and_every(root):
    run = Run()
    with CheckpointManager(root, retention=Retention(latest=2, every=3)) as manager:
        save_all(manager, run, range(8))
        assert manager.steps() == [0, 3, 6, 7]
    names = {entry.name for entry in open_storage(root).list("steps")}
    assert len(names) == 4


def test_versions_have_their_own_retention(root):
    run = Run()
    run.step()
    with CheckpointManager(root, retention=Retention(versions=2)) as manager:
        for _ in range(4):
            manager.publish(run.state)
        manager.wait()
        last = manager.publish(run.state).published.result(30)
    assert last.name == "run-v00000005"
    kept = [e.name for e in open_storage(root).list("adapters") if e.is_dir]
    assert kept == ["run-v00000004", "run-v00000005"]


def test_export_is_found_on_the_model(tmp_path):
    model = Tiny()
    model.adapter_export = lambda: {
        "peft_config": dict(EXPORT.peft_config),
        "rules": [
            {"source": rule.source, "key": rule.key, "scale": rule.scale} for rule in EXPORT.rules
        ],
    }
    with CheckpointManager(tmp_path) as manager:
        assert manager.publish(TrainState(model)).published.result(30).number == 1
