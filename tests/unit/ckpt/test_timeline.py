"""What saves cost, as records in the root: told by real managers, bounded, and never in the way."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from support.ranks_busy import Gate, small_state
from support.tiny_run import Run
from typer.testing import CliRunner

import ckpt.manager
from ckpt import CheckpointManager, CkptError, DamagedError, Retention, StorageError
from ckpt.cli_commands import app
from ckpt.envelope import seal, utc_now
from ckpt.layout import METRICS, segment_path
from ckpt.recorder import Recorder
from ckpt.storage import Storage, open_storage
from ckpt.timeline import (
    MAX_BYTES,
    MAX_RECORDS,
    SEGMENT_FORMAT,
    OpenSave,
    SaveRecord,
    Segment,
)
from ckpt.timeline_store import (
    MAX_SEGMENTS,
    drop_old_segments,
    read_timeline,
    record_removal,
    segment_names,
)


def only(root: Path) -> Segment:
    (segment,) = read_timeline(open_storage(root))
    return segment


def record(number: int, **changes: Any) -> SaveRecord:
    values: dict[str, Any] = {
        "at": utc_now(),
        "step": number,
        "kind": "save",
        "attempt": f"{number:08d}",
        "outcome": "done",
    }
    return SaveRecord(**(values | changes))


def test_saves_leave_their_costs_in_the_root(tmp_path):
    run = Run()
    keep = Retention(latest=1, versions=1)
    with CheckpointManager(tmp_path, retention=keep, run_name="r") as manager:
        first = manager.save(0, run.state, publish=True)
        second = manager.save(1, run.state, publish=True)
        manager.publish(run.state, step=1)
    segment = only(tmp_path)
    assert (segment.source, segment.epoch, segment.closed) == ("trainer", 1, True)
    assert segment.open == ()
    one, two, three = segment.saves
    assert [(r.step, r.kind, r.outcome) for r in segment.saves] == [
        (0, "save", "done"),
        (1, "save", "done"),
        (1, "publish", "done"),
    ]
    assert [r.version for r in segment.saves] == [f"r-v{n:08d}" for n in (1, 2, 3)]
    for told, handle in ((one, first), (two, second)):
        metrics = handle.metrics
        assert told.numbers["stall_ms"] == metrics.stall_ms
        assert told.numbers["total_ms"] == metrics.total_ms
        assert told.numbers["stage_bytes"] == metrics.stage_bytes
        parts = metrics.wait_ms + metrics.plan_ms + metrics.copy_ms
        assert 0 < parts <= metrics.stall_ms
    assert one.numbers["plan_ms"] > two.numbers["plan_ms"]  # the first one planned
    assert (one.removed, one.removed_count) == ((), 0)
    assert two.removed == ("step-00000000.w0001", "r-v00000001")
    assert three.removed == ("r-v00000002",)


def test_what_was_skipped_and_what_failed(tmp_path, monkeypatch):
    state = small_state()
    manager = CheckpointManager(tmp_path, when_busy="latest")
    gate = Gate(manager)
    handles = [manager.save(step, state) for step in range(3)]
    gate.open.set()
    for handle in handles:
        handle.wait(30)
    monkeypatch.setattr(manager._storage, "put", _refuse)
    manager.save(3, state)
    with pytest.raises(CkptError, match="is full"):
        manager.close()
    found = {r.step: (r.outcome, r.problem) for r in only(tmp_path).saves}
    assert found[0] == ("done", None)
    assert found[2] == ("done", None)
    assert found[1][0] == "skipped"
    outcome, problem = found[3]
    assert outcome == "failed"
    assert problem is not None
    assert "disk is full" in problem


def _refuse(path: str, data: object) -> None:
    raise StorageError("the disk is full")


def test_a_save_that_was_left_out_before_it_began_is_told(tmp_path):
    state = small_state()
    with CheckpointManager(tmp_path, when_busy="skip") as manager:
        gate = Gate(manager)
        handles = [manager.save(step, state) for step in range(3)]
        gate.open.set()
        manager.wait()
    assert [handle.skipped for handle in handles] == [False, False, True]
    assert {r.step: r.outcome for r in only(tmp_path).saves}[2] == "skipped"


def test_a_save_under_way_is_shown(tmp_path):
    state = small_state()
    manager = CheckpointManager(tmp_path)
    manager._work._recorder = Recorder(lambda: open_storage(tmp_path), "trainer", 0.02)
    gate = Gate(manager)
    manager.save(7, state)
    deadline = time.monotonic() + 20
    while not read_timeline(open_storage(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    segment = only(tmp_path)
    assert [(one.step, one.kind) for one in segment.open] == [(7, "save")]
    assert not segment.closed
    gate.open.set()
    manager.close()
    assert only(tmp_path).open == ()


def test_it_can_be_left_out(tmp_path):
    with CheckpointManager(tmp_path, timeline=False) as manager:
        manager.save(0, small_state())
    assert not (tmp_path / METRICS).exists()


class Counting:
    """A root that counts what is written, and may hang or fail."""

    has_rename = True
    url = "counting"

    def __init__(self, fail: int = 0, hang: threading.Event | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.puts = 0
        self._fail, self._hang = fail, hang

    def put(self, path: str, data: bytes) -> None:
        self.puts += 1
        if self._hang is not None:
            self._hang.wait(60)
        if self.puts <= self._fail:
            raise StorageError("away")
        self.files[path] = data

    def list(self, path: str) -> list[Any]:
        return []

    def close(self) -> None: ...


def told(storage: Counting) -> list[Segment]:
    return [Segment.from_bytes(storage.files[path], path) for path in sorted(storage.files)]


def test_many_saves_are_few_writes():
    storage = Counting()
    recorder = Recorder(lambda: storage, "trainer", 0.3)
    began = time.monotonic()
    for number in range(100):
        recorder.begun(OpenSave(number, "save", f"{number:08d}", utc_now()), 1)
        recorder.ended(record(number))
        time.sleep(0.002)
    recorder.close()
    assert storage.puts <= 2 + (time.monotonic() - began) / 0.3
    assert [r.step for segment in told(storage) for r in segment.saves] == list(range(100))


def test_a_full_segment_is_followed_by_another():
    storage = Counting()
    recorder = Recorder(lambda: storage, "trainer", 0.01)
    total = 2 * MAX_RECORDS + 44
    for number in range(total):
        recorder.ended(record(number))
        if number % 10 == 0:
            time.sleep(0.003)
    recorder.close()
    segments = told(storage)
    assert [len(segment.saves) for segment in segments] == [MAX_RECORDS, MAX_RECORDS, 44]
    assert [r.step for segment in segments for r in segment.saves] == list(range(total))
    assert sum(segment.dropped for segment in segments) == 0


def test_a_store_that_hangs_holds_nobody(caplog):
    never = threading.Event()
    storage = Counting(hang=never)
    recorder = Recorder(lambda: storage, "trainer", 0.0)
    recorder.ended(record(0))
    began = time.monotonic()
    for number in range(1, 1000):
        recorder.ended(record(number))
    recorder.close(0.2)
    assert time.monotonic() - began < 2
    assert "not in the root after 0.2 s" in caplog.text
    assert len(recorder._saves) <= 2 * MAX_RECORDS
    never.set()


def test_a_store_that_fails_loses_nothing_once_it_is_back(caplog):
    storage = Counting(fail=2)
    recorder = Recorder(lambda: storage, "trainer", 0.01)
    with caplog.at_level(logging.WARNING):
        recorder.ended(record(0))
        deadline = time.monotonic() + 10
        while not storage.files:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        recorder.close()
    (segment,) = told(storage)
    assert [r.step for r in segment.saves] == [0]
    assert caplog.text.count("cannot write the timeline") == 1


def test_a_segment_never_grows_above_what_is_read():
    storage = Counting()
    recorder = Recorder(lambda: storage, "trainer", 60.0)
    names = tuple(f"step-{number:08d}.w0001" for number in range(200))
    for number in range(MAX_RECORDS):
        recorder.ended(record(number, problem="ü" * 500, removed=names, removed_count=1000))
    recorder.close()
    assert len(storage.files) > 2
    assert all(len(data) <= MAX_BYTES for data in storage.files.values())
    steps = [r.step for segment in told(storage) for r in segment.saves]
    assert steps == list(range(MAX_RECORDS))


def test_only_the_newest_segments_stay_and_are_read(tmp_path):
    storage = open_storage(tmp_path)
    now = utc_now()
    data = Segment("trainer", 1, "h", now, now).to_bytes()
    for number in range(MAX_SEGMENTS + 3):
        storage.put(segment_path(number, "abcd"), data)
    storage.put(f"{METRICS}/foreign.json", b"x")
    assert len(read_timeline(storage)) == MAX_SEGMENTS
    record_removal(storage, "by hand", ["step-00000001.w0001"])
    left = sorted(path.name for path in (tmp_path / METRICS).iterdir())
    assert len(left) == MAX_SEGMENTS + 1  # the foreign file is left alone
    assert read_timeline(storage)[-1].removals[0].names == ("step-00000001.w0001",)
    drop_old_segments(storage, 1)
    assert [one.name for one in segment_names(storage)] == left[-2:-1]


def test_what_is_no_segment_is_passed_over(tmp_path, caplog):
    storage = open_storage(tmp_path)
    now = utc_now()
    storage.put(segment_path(1, "aaaa"), b"{}")
    storage.put(segment_path(2, "bbbb"), b" " * (MAX_BYTES + 1))
    storage.put(segment_path(3, "cccc"), Segment("trainer", 1, "h", now, now).to_bytes())
    assert [segment.source for segment in read_timeline(storage)] == ["trainer"]
    assert "passed over" in caplog.text


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("saves", [{}]),
        ("saves", [{"at": "now"}]),
        ("open", [{"step": 1, "kind": "save", "attempt": "aaaa", "since": "x"}] * 9),
        ("removals", [{"at": "2026-01-01T00:00:00Z", "names": ["../../etc"], "count": 1}]),
        ("removals", [{"at": "2026-01-01T00:00:00Z", "names": ["step-1"] * 201, "count": 1}]),
        ("closed", 1),
        ("dropped", -1),
        ("epoch", 0),
        ("source", "s" * 65),
        ("host", 3),
    ],
)
def test_a_segment_that_breaks_a_bound_is_refused(member, value):
    now = utc_now()
    whole: dict[str, Any] = {
        "source": "s",
        "epoch": None,
        "host": "h",
        "began": now,
        "written": now,
        "closed": False,
        "dropped": 0,
        "open": [],
        "saves": [],
        "removals": [],
    }
    Segment.from_bytes(seal(SEGMENT_FORMAT, 1, whole), "x")
    with pytest.raises(DamagedError):
        Segment.from_bytes(seal(SEGMENT_FORMAT, 1, whole | {member: value}), "x")


@pytest.mark.parametrize(
    "changes",
    [
        {"numbers": {"stall_ms": -1.0}},
        {"numbers": {"stall_ms": 1e300}},
        {"numbers": {"other": 1.0}},
        {"slowest": {"stall_ms": True}},
        {"outcome": "lost"},
        {"attempt": "../x"},
        {"version": "<script>"},
        {"problem": "x" * 501},
        {"extra": {str(number): 1.0 for number in range(25)}},
    ],
)
def test_a_record_that_breaks_a_bound_is_refused(changes):
    now = utc_now()
    good = Segment("s", None, "h", now, now, saves=(record(1, extra={"a": 1.0}),))
    assert Segment.from_bytes(good.to_bytes(), "x") == good
    with pytest.raises(DamagedError):
        Segment.from_bytes(
            Segment("s", None, "h", now, now, saves=(record(1, **changes),)).to_bytes(), "x"
        )


def test_what_ckpt_prune_deletes_is_told(tmp_path):
    with CheckpointManager(tmp_path, retention=Retention(latest=9), timeline=False) as manager:
        for step in range(3):
            manager.save(step, small_state())
    command = ["prune", str(tmp_path), "--keep-latest", "1"]
    assert CliRunner().invoke(app, [*command, "--dry-run"]).exit_code == 0
    assert read_timeline(open_storage(tmp_path)) == []
    assert CliRunner().invoke(app, command).exit_code == 0
    segment = only(tmp_path)
    assert segment.source == "ckpt prune"
    assert segment.removals[0].names == ("step-00000000.w0001", "step-00000001.w0001")


@pytest.mark.s3
def test_the_requests_of_a_save_do_not_grow(s3, monkeypatch):
    """On an object store: none within a save, and three in all for a short run."""
    opened: list[Storage] = []

    def noted(*args: Any) -> Storage:
        opened.append(open_storage(*args))
        return opened[-1]

    monkeypatch.setattr(ckpt.manager, "open_storage", noted)
    sent: dict[bool, list[int | None]] = {}
    for told_of in (False, True):
        url, costs = s3.url(f"timeline-{told_of}"), []
        with CheckpointManager(
            url, storage_options=s3.storage_options, on_metrics=costs.append, timeline=told_of
        ) as manager:
            for step in range(4):
                manager.save(step, small_state()).wait(60)
        sent[told_of] = [metrics.store_requests for metrics in costs]
    assert sent[True] == sent[False]
    *_, with_timeline, its_own = opened
    assert its_own.traffic.requests <= 3 < with_timeline.traffic.requests
    (segment,) = read_timeline(open_storage(url, s3.storage_options))
    assert [r.step for r in segment.saves] == [0, 1, 2, 3]
