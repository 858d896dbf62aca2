"""What saves cost, in TensorBoard: real event files, and a clear word where it is missing."""

from __future__ import annotations

import sys

import pytest
from support.ranks_busy import small_state

from ckpt import CheckpointManager, ConfigError, SaveMetrics, TensorBoardReporter

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own code


def scalars(directory) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_every_number_of_a_save_is_drawn(tmp_path):
    seen: list[SaveMetrics] = []
    board = TensorBoardReporter(tmp_path / "board")
    with CheckpointManager(tmp_path / "root", on_metrics=[seen.append, board]) as manager:
        for step in (3, 5):
            manager.save(step, small_state())
    found = scalars(tmp_path / "board")
    assert [step for step, _ in found["ckpt/stall_ms"]] == [3, 5]
    for place, metrics in enumerate(seen):
        assert found["ckpt/stall_ms"][place][1] == pytest.approx(metrics.stall_ms)
        assert found["ckpt/stage_bytes"][place][1] == metrics.stage_bytes
        assert found["ckpt/total_ms"][place][1] == pytest.approx(metrics.total_ms)
    assert "ckpt/publish_ms" not in found
    assert [value for _, value in found["ckpt/planned"]] == [1.0, 0.0]


class Writer:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.rows.append((name, value, step))

    def flush(self) -> None: ...


def test_a_writer_of_the_callers(tmp_path):
    writer = Writer()
    report = TensorBoardReporter(writer=writer, prefix="saves")
    report(SaveMetrics(step=4, extra={"mirror_queue": 2.0}))
    report(SaveMetrics(step=None, publish_ms=1.5))
    assert ("saves/mirror_queue", 2.0, 4) in writer.rows
    assert ("saves/publish_ms", 1.5, 4) in writer.rows
    for both in ({}, {"log_dir": tmp_path, "writer": writer}):
        with pytest.raises(ConfigError, match="not both"):
            TensorBoardReporter(**both)


def test_a_missing_tensorboard_is_said_at_once(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"archon-lora\[tensorboard\]"):
        TensorBoardReporter(tmp_path)


def test_a_reporter_that_cannot_be_called_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="on_metrics must be callable"):
        CheckpointManager(tmp_path, on_metrics=[print, 3])
