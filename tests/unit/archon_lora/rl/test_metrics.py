"""Metrics keep every bit, survive a kill, and never hide a NaN."""

import math

import pytest

from archon_lora.rl.metrics import MetricsWriter, ProgressDisplay, read_metrics


def test_floats_come_back_bit_for_bit(tmp_path):
    path = tmp_path / "deep" / "m.jsonl"
    writer = MetricsWriter(path)
    values = [0.1 + 0.2, 1e-310, -0.0, math.pi]
    for step, value in enumerate(values):
        writer.write({"step": step, "loss": value})
    writer.close()
    got = [record["loss"] for record in read_metrics(path).values()]
    assert [v.hex() for v in got] == [v.hex() for v in values]


def test_the_last_line_of_a_step_wins_and_events_are_no_steps(tmp_path):
    path = tmp_path / "m.jsonl"
    for loss in (1.0, 2.0):
        writer = MetricsWriter(path)
        writer.write({"event": "start", "world": 2})
        writer.write({"step": 4, "loss": loss})
        writer.close()
    assert read_metrics(path) == {4: {"step": 4, "loss": 2.0}}


def test_a_torn_line_costs_only_itself(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n{"step": 1, "lo')
    writer = MetricsWriter(path)
    writer.write({"step": 1, "loss": 3.0})
    writer.close()
    assert {step: r["loss"] for step, r in read_metrics(path).items()} == {0: 1.0, 1: 3.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_stops_the_run(tmp_path, bad):
    writer = MetricsWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=r"metric kl is .* at step 3"):
        writer.write({"step": 3, "kl": bad})
    writer.close()
    assert read_metrics(tmp_path / "m.jsonl") == {}


def test_without_a_terminal_each_step_is_one_plain_line(capsys):
    record = {"step": 2, "reward": 0.5, "loss": -0.1, "kl": 0.02, "stall_ms": 1.25}
    with ProgressDisplay(total=9, start=0, enabled=True) as display:
        display.step(record)
    with ProgressDisplay(total=9, start=0, enabled=False) as display:
        display.step(record)
    err = capsys.readouterr().err
    assert err == "step 3/9  reward 0.500  loss -0.1000  kl 0.020  stall 1.2 ms\n"
