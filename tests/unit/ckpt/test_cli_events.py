"""``ckpt serve --json`` and ``ckpt sync --json``: events as lines, the log apart, status 0."""

from __future__ import annotations

import itertools
import json
import signal
import threading
from pathlib import Path

import httpx
import pytest
from support.cli_process import CliProcess
from support.fake_engine import FakeEngine
from support.published import publish_one

from ckpt.cli_events import Events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_service_says_where_it_answers_and_that_it_ended(tmp_path: Path, number: int) -> None:
    publish_one(tmp_path / "lab")
    call = ["--root", str(tmp_path / "lab"), "--root", str(tmp_path / "later")]
    with CliProcess(tmp_path, "serve", *call, "--listen", "127.0.0.1:0", "--json") as one:
        serving = one.until(lambda event: event["event"] == "serving")
        assert serving["runs"] == ["lab", "later"]
        (address,) = serving["addresses"]
        answer = httpx.get(f"{address}/v1/runs", timeout=20).json()
        assert [row["run"] for row in answer["runs"]] == ["lab", "later"]
        assert one.stop(number) == 0
        assert [event["event"] for event in one.events()] == ["serving", "stopped"]
        log = [json.loads(line) for line in one.err.read_text().splitlines()]
        (warning,) = [line["message"] for line in log if line["level"] == "warning"]
        assert f"no such directory yet: {tmp_path / 'later'}" in warning


def test_a_sidecar_says_what_each_engine_serves(tmp_path: Path) -> None:
    root, options = tmp_path / "root", ("--check", "0.1", "--poll", "0.05")
    publish_one(root, seed=0)
    with FakeEngine("vllm") as engine:
        call = ["sync", str(root), "--run", "run7", "--engine", engine.address, *options]
        call += ["--cache", str(tmp_path / "cache"), "--listen", "127.0.0.1:0", "--json"]
        with CliProcess(tmp_path, *call) as sidecar:
            ready = sidecar.until(lambda event: event.get("version") == "run7-v00000001")
            assert ready["event"] == "status"
            publish_one(root, seed=1)
            now = sidecar.until(lambda e: e.get("version") == "run7-v00000002" and e["ready"])
            (replica,) = now["replicas"].values()
            assert replica == {"up": True, "live": "run7-v00000002", "problem": None}
            assert sidecar.stop() == 0
            events = sidecar.events()
            assert events[0]["event"] == "serving"
            assert events[-1]["event"] == "stopped"
            statuses = [e for e in events if e["event"] == "status"]
            bare = [{k: v for k, v in e.items() if k != "at"} for e in statuses]
            assert all(one != two for one, two in itertools.pairwise(bare))
            log = sidecar.err.read_text()
            assert "answering on http://127.0.0.1:" in log
            assert not log.startswith("{")


def test_without_json_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    events, stop = Events(wanted=False), threading.Event()
    events.say("serving")
    assert events.follow(lambda: ("status", {}), stop) is None
    assert capsys.readouterr().out == ""


def test_the_last_state_is_told_although_nobody_looked_in_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    events, stop, looked, state = (
        Events(wanted=True),
        threading.Event(),
        threading.Event(),
        {"n": 0},
    )

    def look() -> tuple[str, dict[str, int]]:
        now = dict(state)
        looked.set()
        return "status", now

    thread = events.follow(look, stop)
    assert thread is not None
    assert looked.wait(30)
    state["n"] = 1
    stop.set()
    thread.join(10)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["n"] for line in lines] == [0, 1]
