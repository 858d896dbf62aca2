"""Jobs: asked for, done, watched, cancelled; and what a dead service leaves of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.published import damage, publish_one
from support.serving import serving
from support.steps import tiny_adapter, write_step

from ckpt.consolidate import consolidate
from ckpt.holds import pin
from ckpt.job_names import job_dir
from ckpt.service.jobs.records import JobBook
from ckpt.storage import Storage, open_storage
from ckpt.timeline_store import read_timeline


def fill(path: Path, steps: int = 4) -> Storage:
    """Steps and versions."""
    storage = open_storage(path)
    tensors, export = tiny_adapter()
    for step in range(steps):
        write_step(storage, step, tensors, export=export, world=2, metrics={"reward": float(-step)})
        publish_one(path, seed=step)
    return storage


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    fill(tmp_path / "lab")
    return tmp_path / "lab"


@pytest.fixture
def client(lab: Path) -> Iterator[httpx.Client]:
    with serving(lab, job_timeout_s=2.0) as client:
        yield client


def start(client: httpx.Client, **body: Any) -> str:
    """Ask for a job; its id."""
    answer = client.post("/v1/runs/lab/jobs", json=body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def ended(client: httpx.Client, job: str, within_s: float = 20) -> dict[str, Any]:
    """A job once it has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        row: dict[str, Any] = client.get(f"/v1/runs/lab/jobs/{job}").json()
        if row["finished"] is not None:
            return row
        time.sleep(0.02)
    raise AssertionError(f"still {row}")


def done(client: httpx.Client, **body: Any) -> dict[str, Any]:
    row = ended(client, start(client, **body))
    assert row["state"] == "succeeded", row
    result: dict[str, Any] = row["result"]
    return result


def test_an_export_is_what_the_command_makes(client: httpx.Client, lab: Path) -> None:
    made = done(client, kind="export", step=2)
    assert made["name"] == "step-00000002.w0001-bfloat16"
    consolidate(lab, 2, lab.parent / "want")
    for file in made["files"]:
        got = client.get(f"/v1/runs/lab/exports/{made['name']}/files/{file['name']}")
        assert got.content == (lab.parent / "want" / file["name"]).read_bytes()
    (row,) = client.get("/v1/runs/lab/exports").json()["exports"]
    assert row["adapter_sha256"] == made["adapter_sha256"]
    # The same again is there already; another dtype is another one.
    assert done(client, kind="export", step=2) == made
    assert done(client, kind="export", dtype="float32")["name"] == "step-00000003.w0001-float32"
    assert client.delete(f"/v1/runs/lab/exports/{made['name']}").status_code == 204
    assert client.delete(f"/v1/runs/lab/exports/{made['name']}").status_code == 404


def test_verify_finds_what_is_damaged(client: httpx.Client, lab: Path) -> None:
    assert done(client, kind="verify")["ok"] is True
    damage(lab, "run7-v00000003")
    found = done(client, kind="verify")
    assert found["ok"] is False
    assert [row["path"] for row in found["damaged"]] == ["adapters/run7-v00000003"]
    assert done(client, kind="verify", step=1)["checked"] == {"step-00000001.w0001": True}
    assert done(client, kind="verify", version="run7-v00000003")["ok"] is False
    rows = client.get("/v1/runs/lab/versions").json()["versions"]
    seen = {row["number"]: row["verified"]["ok"] for row in rows}
    assert seen == {1: True, 2: True, 3: False, 4: True}


def test_a_prune_needs_the_plan_of_a_dry_run(client: httpx.Client, lab: Path) -> None:
    rules = {"kind": "prune", "keep_latest": 2, "keep_versions": 3}
    pin(open_storage(lab), "step-00000000.w0001", "the first")
    shown = done(client, **rules)
    falls = [row["name"] for row in shown["entries"] if not row["keep"]]
    assert falls == ["step-00000001.w0001", "run7-v00000001"]
    assert len(client.get("/v1/runs/lab/steps").json()["steps"]) == 4  # nothing happened yet
    wrong = ended(client, start(client, **rules, confirm="0" * 64))
    assert (wrong["state"], wrong["error"]["type"]) == ("failed", "ConfigError")
    pruned = done(client, **rules, confirm=shown["plan"])
    assert [row["name"] for row in pruned["entries"] if not row["keep"]] == falls
    left = client.get("/v1/runs/lab/steps").json()["steps"]
    assert [row["step"] for row in left] == [3, 2, 0]
    assert not (lab / "adapters" / "run7-v00000001").exists()
    again = ended(client, start(client, **rules, confirm=shown["plan"]))
    assert again["state"] == "failed"  # the root is another one by now
    (told,) = read_timeline(open_storage(lab))  # and the timeline shows what was deleted
    assert (told.source, set(told.removals[0].names)) == ("ckpt serve", set(falls))


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "destroy"},
        {"kind": "prune"},
        {"kind": "prune", "every": 3, "keep_versions": 1},
        {"kind": "prune", "keep_latest": 0},
        {"kind": "verify", "step": 1, "version": "run7-v00000001"},
        {"kind": "export", "out": "/etc/cron.d"},
        {"kind": "export", "dtype": "int8"},
        {},
    ],
)
def test_a_job_that_cannot_work_is_refused_at_once(client: httpx.Client, body: Any) -> None:
    answer = client.post("/v1/runs/lab/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["type"]) == (422, "ConfigError")
    assert client.get("/v1/runs/lab/jobs").json() == {"jobs": []}


def test_a_job_fails_with_its_reason(client: httpx.Client) -> None:
    missing = client.post("/v1/runs/lab/jobs", json={"kind": "export", "step": 99})
    assert missing.status_code == 404
    row = ended(client, start(client, kind="verify", step=99))
    assert (row["state"], row["error"]["type"]) == ("failed", "NoCheckpoint")


def test_a_job_that_waits_can_be_cancelled(lab: Path) -> None:
    with serving(lab, job_workers=0) as idle:
        job = start(idle, kind="verify")
        assert idle.post(f"/v1/runs/lab/jobs/{job}/cancel").status_code == 202
        assert idle.get(f"/v1/runs/lab/jobs/{job}").json()["state"] == "waiting"
    with serving(lab, job_timeout_s=1.0) as client:
        assert ended(client, job)["state"] == "cancelled"


def test_another_service_does_what_one_recorded(lab: Path) -> None:
    with serving(lab, job_workers=0) as idle, serving(lab, job_timeout_s=1.0) as busy:
        job = start(idle, kind="verify")
        assert ended(idle, job)["state"] == "succeeded"
        (row,) = busy.get("/v1/runs/lab/jobs").json()["jobs"]
        assert (row["id"], row["by"], row["result"]) == (job, "local", None)


def test_old_jobs_are_forgotten(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.service.jobs.runner.KEPT", 2)
    with serving(lab, job_timeout_s=1.0) as client:
        jobs = []
        for _ in range(4):
            jobs.append(start(client, kind="verify", step=1))
            ended(client, jobs[-1])
        shown = [row["id"] for row in client.get("/v1/runs/lab/jobs").json()["jobs"]]
        assert shown == list(reversed(jobs[1:]))
        assert client.get(f"/v1/runs/lab/jobs/{jobs[0]}").status_code == 404


def test_a_job_that_was_never_recorded_whole_is_swept(lab: Path) -> None:
    for job in ("job-1600000000000-0123abcd", "job-9600000000000-0123abcd"):
        (lab / job_dir(job)).mkdir(parents=True)
        (lab / job_dir(job) / ".tmp-x-job.json").touch()
    assert list(JobBook(open_storage(lab)).unfinished(set())) == []
    assert [path.name for path in (lab / "jobs").iterdir()] == ["job-9600000000000-0123abcd"]


def test_records_of_others_do_not_count(lab: Path) -> None:
    book = JobBook(open_storage(lab))
    job = book.create("verify", {}, "somebody")
    first = book.take(job.id, 1, "a")
    assert first is not None
    assert book.take(job.id, 1, "b") is None
    (lab / job_dir(job.id) / "beat.json").write_bytes(b"{}")
    assert book.read_beat(job.id) is None
    (lab / "jobs" / "not-a-job").mkdir()
    assert book.ids() == [job.id]
