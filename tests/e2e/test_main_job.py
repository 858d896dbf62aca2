"""The main job for real: the demonstration, shortened, and what happens when a rank dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from support.train_ranks import environment, start_ranks

from archon_lora.models.tiny import write_tiny_qwen2
from archon_lora.rl.demo.processes import Child, ChildFailed, descendants
from archon_lora.rl.demo.run import DemoSettings, run_demo
from archon_lora.rl.metrics import read_events, read_metrics

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

REPO = Path(__file__).resolve().parents[2]

SHORT = DemoSettings(steps=12, more_steps=2, kill_after=3, publish_every=4, margin=0.03)


@pytest.mark.s3
@pytest.mark.dist
@pytest.mark.compat
def test_every_check_of_the_demonstration_holds(tmp_path):
    before = set(descendants(os.getpid()))  # such as the S3 server of other tests
    report = run_demo(tmp_path, SHORT, console=Console())
    assert [check for check in report.checks if check.passed is False] == []
    assert report.passed
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["passed"] is True
    assert len([c for c in found["checks"] if c["passed"]]) == 10
    assert found["figures"]["logits_max_difference"] <= 1e-4
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    # The server's port is free again, and no child is left.
    assert set(descendants(os.getpid())) <= before


@pytest.mark.dist
def test_a_phase_that_breaks_is_a_failed_check_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("archon_lora.rl.demo.run._CONFIG", "[run]\nsteps = 0\n")
    report = run_demo(
        tmp_path, DemoSettings(store="local", deadline_s=60), console=Console(width=200)
    )
    assert not report.passed
    (check,) = report.checks
    assert check.claim == "reference, and all that follows"
    assert "ended with status" in check.measured
    assert "model.path is required" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["passed"] is False


@pytest.mark.s3
@pytest.mark.dist
def test_a_demonstration_that_is_stopped_leaves_nothing_running(tmp_path):
    command = [sys.executable, "-m", "archon_lora.cli", "demo", "--out", str(tmp_path / "out")]
    with Child(command, log=tmp_path / "demo.log", env=environment()) as demo:
        # The server, the launcher and two ranks.
        demo.until(lambda: len(descendants(demo.pid)) >= 4, 90, "ranks")
        below = descendants(demo.pid)
        os.kill(demo.pid, signal.SIGTERM)
        assert demo.wait(60) == 128 + signal.SIGTERM
    deadline = time.monotonic() + 10
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, below))


@pytest.mark.dist
@pytest.mark.parametrize("victim", [0, 1])
def test_the_other_rank_of_a_dead_one_ends_by_itself(tmp_path, victim):
    model = write_tiny_qwen2(tmp_path / "m", hidden=32, layers=1, std=0.1)
    config = tmp_path / "c.toml"
    config.write_text(
        f'[run]\nsteps = 100000\ntimeout_s = 20\nmetrics = "{tmp_path / "m.jsonl"}"\n'
        f'[model]\npath = "{model}"\n[checkpoint]\nroot = "{tmp_path / "root"}"\n'
        "vote_timeout_s = 20\n"
    )
    ranks = start_ranks(config, 2, tmp_path)
    try:
        metrics = tmp_path / "m.jsonl"
        ranks[0].until(lambda: metrics.exists() and 3 in read_metrics(metrics), 90, "step 3")
        os.kill(ranks[victim].pid, signal.SIGKILL)
        began = time.monotonic()
        survivor = ranks[1 - victim]
        assert survivor.wait(60) == 1
        assert time.monotonic() - began < 45
        assert f"archon-lora [rank {1 - victim}]:" in survivor.tail()
    finally:
        for child in ranks:
            child.stop()
    # What was committed is whole, and the run goes on from it on the rank that is left.
    listed = subprocess.run(
        [sys.executable, "-m", "ckpt.cli", "verify", str(tmp_path / "root"), "--json"],
        capture_output=True, text=True, env=environment(), timeout=60, check=True,
    )  # fmt: skip
    assert json.loads(listed.stdout)["ok"]
    last = max(read_metrics(metrics))
    (alone,) = start_ranks(config, 1, tmp_path, run__steps=last + 3)
    with alone:
        alone.succeed(90)
    resumed = read_events(metrics, "start")[-1]
    assert resumed["world"] == 1
    assert last - 3 <= resumed["restored"] <= last
    assert resumed["in_flight"] == [resumed["restored"] + 1]
    assert max(read_metrics(metrics)) == last + 2


@pytest.mark.dist
def test_a_sigterm_to_one_rank_saves_and_ends_both(tmp_path):
    model = write_tiny_qwen2(tmp_path / "m", hidden=32, layers=1, std=0.1)
    config = tmp_path / "c.toml"
    config.write_text(
        f'[run]\nsteps = 100000\ntimeout_s = 30\nmetrics = "{tmp_path / "m.jsonl"}"\n'
        f'[model]\npath = "{model}"\n[checkpoint]\nroot = "{tmp_path / "root"}"\n'
        "save_every = 90000\nvote_timeout_s = 30\npreempt_deadline_s = 60.0\n"
    )
    ranks = start_ranks(config, 2, tmp_path)
    try:
        metrics = tmp_path / "m.jsonl"
        ranks[0].until(lambda: metrics.exists() and 2 in read_metrics(metrics), 90, "step 2")
        os.kill(ranks[1].pid, signal.SIGTERM)
        assert [child.wait(90) for child in ranks] == [143, 143]
    finally:
        for child in ranks:
            child.stop()
    last = max(read_metrics(metrics))
    for rank, child in enumerate(ranks):
        said = f"archon-lora [rank {rank}]: stopped by a signal: step {last} is committed"
        assert said in child.tail()
    assert [event["version"] for event in read_events(metrics, "preempted")] == [last + 1]
    # The cadence would have saved nothing yet; the run goes on after the very last step.
    (alone,) = start_ranks(config, 1, tmp_path, run__steps=last + 2)
    with alone:
        alone.succeed(90)
    assert read_events(metrics, "start")[-1]["restored"] == last


def test_the_example_trains_as_printed(tmp_path):
    """The commands at the top of examples/train.toml."""
    text = (REPO / "examples" / "train.toml").read_text()
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "train.toml").write_text(text)
    commands = [
        line.removeprefix("#").split()[1:]
        for line in text.splitlines()
        if line.startswith("#   archon-lora")
    ]
    assert [command[0] for command in commands] == ["make-tiny", "train"]
    commands[1] += ["--set", "run.steps=4"]
    for command in commands:
        subprocess.run(
            [sys.executable, "-m", "archon_lora.cli", *command],
            cwd=tmp_path, env=environment(), timeout=120, check=True, capture_output=True,
        )  # fmt: skip
    records = read_metrics(tmp_path / "runs" / "kinds" / "metrics.jsonl")
    assert sorted(records) == [0, 1, 2, 3]


# -- children ----------------------------------------------------------------------------------


def python(code):
    return [sys.executable, "-c", code]


def test_a_child_that_fails_shows_the_end_of_its_log(tmp_path):
    code = "import sys; print('\\n'.join(map(str, range(99)))); sys.exit(7)"
    with (
        Child(python(code), log=tmp_path / "x.log", env=environment()) as child,
        pytest.raises(ChildFailed, match=r"x ended with status 7") as caught,
    ):
        child.succeed(30)
    assert str(caught.value).endswith("96\n97\n98")


def test_a_child_past_its_deadline_is_ended_with_all_below_it(tmp_path):
    grandchild = "import time; time.sleep(600)"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}], start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(600)"
    )
    log = tmp_path / "x.log"
    with Child(python(code), log=log, env=environment()) as child:
        child.until(lambda: log.read_text().endswith("\n"), 30, "pid")
        pid = int(log.read_text())
        with pytest.raises(ChildFailed, match="still running after 0 s"):
            child.succeed(0.1)
        assert pid in descendants(child.pid)
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid):
    """Running; a zombie that nobody has reaped yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_waiting_for_a_child_that_ended_is_an_error(tmp_path):
    with (
        Child(python("pass"), log=tmp_path / "x.log", env=environment()) as child,
        pytest.raises(ChildFailed, match="x ended before anything"),
    ):
        child.until(lambda: False, 30, "anything")
