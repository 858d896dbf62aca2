"""Saves that come faster than the store takes them, on one rank; and what a save reports."""

from __future__ import annotations

import operator
import threading

import pytest
from support.ranks_busy import Gate, result, small_state
from support.tiny_run import Run

from ckpt import CheckpointManager, ConfigError, SaveMetrics


def manager_of(tmp_path, **settings):
    manager = CheckpointManager(tmp_path, **settings)
    return manager, Gate(manager)


def test_block_waits_for_a_slot(tmp_path):
    manager, gate = manager_of(tmp_path)
    state = small_state()
    done = threading.Event()

    def third():
        handles.append(manager.save(2, state))
        done.set()

    handles = [manager.save(0, state), manager.save(1, state)]
    thread = threading.Thread(target=third)
    thread.start()
    assert not done.wait(0.2)
    gate.open.set()
    assert done.wait(30)
    thread.join()
    assert [result(handle) for handle in handles] == [(0, False), (1, False), (2, False)]
    manager.close()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("skip", [(0, False), (1, False), (None, True), (None, True)]),
        ("latest", [(0, False), (None, True), (None, True), (3, False)]),
    ],
)
def test_skip_and_latest(tmp_path, mode, expected):
    seen: list[SaveMetrics] = []
    manager, gate = manager_of(tmp_path, when_busy=mode, on_metrics=seen.append)
    state = small_state()
    handles = [manager.save(step, state) for step in range(4)]
    assert [handle.metrics.queue_depth for handle in handles[:2]] == [0, 1]
    gate.open.set()
    assert [result(handle) for handle in handles] == expected
    manager.wait()
    skipped = [step for step, (_, left_out) in enumerate(expected) if left_out]
    assert [m.step for m in seen if m.skipped] == skipped
    assert all(m.stage_bytes == 0 or m.total_ms is None for m in seen if m.skipped)
    for handle in handles:
        handle.wait(0)
        handle.wait_staged(0)
    # A number that was left out is free, one that was committed is not.
    manager.save(skipped[0], state).wait(30)
    manager.close()
    assert manager.steps() == sorted({0, 1, 2, 3} - set(skipped[1:]))


def test_latest_never_gives_up_what_has_begun(tmp_path):
    manager, gate = manager_of(tmp_path, when_busy="latest")
    state = small_state()
    first = manager.save(0, state)
    assert gate.waiting.acquire(timeout=30)
    rest = [manager.save(step, state) for step in (1, 2, 3)]
    gate.open.set()
    assert result(first) == (0, False)
    assert [result(handle)[1] for handle in rest] == [True, True, False]
    manager.close()


def test_saves_and_publishes_have_slots_of_their_own(tmp_path):
    run = Run()
    manager, gate = manager_of(tmp_path, when_busy="skip")
    handles = [manager.save(0, run.state), manager.publish(run.state), manager.publish(run.state)]
    handles += [manager.publish(run.state), manager.save(1, run.state), manager.save(2, run.state)]
    gate.open.set()
    manager.wait()
    assert [handle.skipped for handle in handles] == [False, False, False, True, False, True]
    assert handles[3].published.result(0) is None
    manager.close()


def test_unknown_modes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'block', 'skip', 'latest'"):
        CheckpointManager(tmp_path, when_busy="wait")


def test_a_save_reports_what_it_cost(tmp_path):
    run = Run()
    run.step()
    seen: list[SaveMetrics] = []
    with CheckpointManager(tmp_path, on_metrics=seen.append) as manager:
        manager.save(0, run.state, publish=True)
        manager.save(1, run.state)
        manager.publish(run.state, step=1)
    first, second, third = seen
    step = tmp_path / "steps" / "step-00000000.w0001"
    written = sum(path.stat().st_size for path in step.iterdir())
    shard = (step / "shard-00000-of-00001.safetensors").stat().st_size
    assert (first.step, first.planned, first.skipped) == (0, True, False)
    assert first.stage_bytes == shard
    assert (second.step, second.planned, second.stage_bytes) == (1, False, shard)
    assert first.store_bytes >= written
    assert 1 <= second.store_requests < first.store_requests
    assert second.publish_ms is second.publish_lag_ms is None
    for metrics in (first, third):
        assert 0 < metrics.publish_ms <= metrics.publish_lag_ms <= metrics.total_ms
    for metrics in (first, second):
        assert 0 < metrics.stall_ms <= metrics.total_ms
        assert 0 < metrics.write_ms <= metrics.total_ms
        assert 0 < metrics.commit_ms <= metrics.total_ms


@pytest.mark.parametrize("publish", [False, True])
def test_whoever_waits_for_a_handle_finds_its_totals(tmp_path, publish):
    run = Run()
    run.step()
    told: dict[str, tuple[float | None, int | None, int | None]] = {}

    def note(name, metrics):
        # Runs at the moment at which waiting threads are woken.
        told[name] = (metrics.total_ms, metrics.store_requests, metrics.store_bytes)

    with CheckpointManager(tmp_path) as manager:
        handle = manager.save(0, run.state, publish=publish)
        for name in ("committed", "published"):
            future = getattr(handle, name)
            future.add_done_callback(lambda _future, name=name: note(name, handle.metrics))
        handle.wait(60)
        assert None not in told["committed"]
        assert None not in told["published"]
        if publish:
            assert all(map(operator.lt, told["committed"], told["published"]))


def test_a_failed_save_is_reported_too(tmp_path, monkeypatch):
    seen: list[SaveMetrics] = []
    manager = CheckpointManager(tmp_path, on_metrics=seen.append)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manager._storage, "put", full)
    handle = manager.save(0, small_state())
    assert handle.committed.exception(30) is not None
    with pytest.raises(Exception, match="No space left"):
        manager.wait()
    manager.close()
    (metrics,) = seen
    assert metrics.total_ms > 0
    assert metrics.commit_ms is None
