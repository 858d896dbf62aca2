"""Services that are killed in the middle of a job: a restart finishes it or cleans it up.

Whoever looks meanwhile, at the root or through another service, sees a whole thing or none.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.published import publish_one
from support.services import killable
from support.serving import serving
from support.steps import tiny_adapter, write_step

from ckpt.catalog import check_step, list_steps
from ckpt.consolidate import consolidate
from ckpt.job_names import EXPORTS
from ckpt.service.jobs.records import JobBook
from ckpt.service.jobs.work import read_export
from ckpt.storage import Storage, open_storage
from ckpt.storage.faultpoints import JOB_POINTS, OBJECT_POINTS, POSIX_POINTS
from ckpt.versions import check_version, list_versions

RULES = {"keep_latest": 2, "keep_versions": 2}
EXPORT = "step-00000001.w0001-bfloat16"
WRITES = [point for point in POSIX_POINTS if "put_new" not in point]
PUTS = [point for point in OBJECT_POINTS if "multipart" not in point and "put_new" not in point]
CREATES = ["posix.put_new.before_link", "posix.put_new.after_link"]

KINDS = ("export", "verify", "prune")

CELLS = [
    *[(kind, point, 1) for kind in KINDS for point in JOB_POINTS],
    *[(kind, "job.unit", 3) for kind in ("verify", "prune")],
    *[("export", point, nth) for point in WRITES for nth in (1, 2, 3, 4)],
    *[("prune", point, nth) for point in WRITES[-2:] for nth in (1, 2)],
    *[(kind, point, nth) for kind in KINDS for point in CREATES for nth in (1, 2, 3)],
]


def fill(url: str | Path, options: dict[str, Any] | None = None) -> Storage:
    """Five steps and five versions."""
    storage = open_storage(str(url), options)
    tensors, export = tiny_adapter()
    for step in range(5):
        write_step(storage, step, tensors, export=export, world=2)
        publish_one(url, seed=step, options=options)
    return storage


def nothing_is_half(storage: Storage) -> None:
    """Every step, version and export that anybody sees is whole."""
    for entry in list_steps(storage):
        assert entry.state == "committed" or entry.manifest is None
        assert list(check_step(storage, entry)) == []
    for version in list_versions(storage):
        if version.state != "claimed":
            assert list(check_version(storage, version)) == []
    for item in storage.list(EXPORTS):
        if item.is_dir and not item.name.startswith("."):
            if not storage.has_rename and not storage.exists(
                f"{EXPORTS}/{item.name}/MANIFEST.json"
            ):
                continue  # without it, there is no such export
            made = read_export(storage, item.name)
            for file in made.files:
                assert storage.size(f"{EXPORTS}/{item.name}/{file.name}") == file.size


def remains(root: Path) -> list[str]:
    """Names of unfinished work and of what is on its way out.

    Records of jobs that were never asked for whole are no job's; they go after an hour.
    """
    found = (path for path in root.rglob("*") if path.name.startswith((".tmp-", ".trash-")))
    return [str(path) for path in found if not path.name.endswith("-job.json")]


def body_of(kind: str, client: httpx.Client) -> dict[str, Any]:
    """What is asked for; the plan of a prune comes from a dry run before."""
    if kind == "prune":
        job = client.post("/v1/runs/lab/jobs", json={"kind": kind, **RULES}).json()["id"]
        return {"kind": kind, **RULES, "confirm": ended(client, job)["result"]["plan"]}
    return {"kind": kind, **({"step": 1} if kind == "export" else {})}


def ended(client: httpx.Client, job: str, within_s: float = 40) -> dict[str, Any]:
    """A job once it has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        row: dict[str, Any] = client.get(f"/v1/runs/lab/jobs/{job}").json()
        if row["finished"] is not None:
            return row
        time.sleep(0.03)
    raise AssertionError(f"still {row}")


def as_asked(kind: str, row: dict[str, Any], storage: Storage, want: Path) -> None:
    """The job has done what it was asked for."""
    assert row["state"] == "succeeded", row
    if kind == "export":
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert storage.read(f"{EXPORTS}/{EXPORT}/{file}") == (want / file).read_bytes()
    elif kind == "verify":
        assert row["result"]["ok"] is True
    else:
        assert [entry.step for entry in list_steps(storage)] == [3, 4]
        left = [v.number for v in list_versions(storage) if v.state == "committed"]
        assert left == [4, 5]


@pytest.mark.slow
@pytest.mark.cells(4)
@pytest.mark.parametrize(("kind", "point", "nth"), CELLS)
def test_a_service_is_killed_in_the_middle_of_a_job(
    kind: str, point: str, nth: int, tmp_path: Path
) -> None:
    root = tmp_path / "lab"
    storage = fill(root)
    consolidate(root, 1, tmp_path / "want")
    with serving(root, job_timeout_s=1.0) as client:
        body = body_of(kind, client)
    with (
        killable(root, fault=f"{point}:{nth}=kill", job_timeout_s=1.0) as victim,
        httpx.Client(base_url=victim.url, timeout=20) as client,
    ):
        try:
            job = client.post("/v1/runs/lab/jobs", json=body).json()["id"]
        except httpx.TransportError:  # killed while it recorded the job
            victim.died()
            job = next(iter(JobBook(storage).ids()), "")
        died = victim.died(3) or (bool(job) and victim.died(6))
        nothing_is_half(storage)
    assert died or nth > 1 or point in WRITES, "the first pass must be reached"
    with serving(root, job_timeout_s=1.0) as client:  # as after a restart
        ids = [job for job in JobBook(storage).ids() if JobBook(storage).find(job)]
        if not ids:
            return  # it died before the job existed, and nobody was told that it did
        row = ended(client, ids[-1])
        if row["params"].get("confirm") or kind != "prune":
            as_asked(kind, row, storage, tmp_path / "want")
        nothing_is_half(storage)
    assert remains(root) == []


S3_CELLS = [
    *[(kind, "job.unit", 1) for kind in ("export", "prune")],
    *[("export", point, nth) for point in PUTS for nth in (1, 2, 3)],
    *[(kind, "object.put_new.after", 2) for kind in ("export", "verify", "prune")],
]


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.cells(1)
@pytest.mark.parametrize(("kind", "point", "nth"), S3_CELLS)
def test_on_s3(kind: str, point: str, nth: int, s3: Any, tmp_path: Path) -> None:
    url, options = s3.url("service") + "/lab", s3.storage_options
    storage = fill(url, options)
    consolidate(url, 1, tmp_path / "want", storage_options=options)
    with serving(url, options=options, job_timeout_s=1.0) as client:
        body = body_of(kind, client)
    with (
        killable(url, fault=f"{point}:{nth}=kill", options=options, job_timeout_s=1.0) as victim,
        httpx.Client(base_url=victim.url, timeout=30) as client,
    ):
        with contextlib.suppress(httpx.TransportError):
            client.post("/v1/runs/lab/jobs", json=body)
        victim.died(8)
        nothing_is_half(storage)
    ids = [job for job in JobBook(storage).ids() if JobBook(storage).find(job)]
    if not ids:
        return
    with serving(url, options=options, job_timeout_s=1.0) as client:
        row = ended(client, ids[-1])
        if row["params"].get("confirm") or kind != "prune":
            as_asked(kind, row, storage, tmp_path / "want")
        nothing_is_half(storage)


def test_the_survivor_of_two_services_finishes_what_the_other_began(tmp_path: Path) -> None:
    root = tmp_path / "lab"
    storage = fill(root)
    consolidate(root, 1, tmp_path / "want")
    with killable(root, fault="job.unit=kill", job_timeout_s=1.0) as victim:
        with serving(root, job_workers=0) as idle:  # both see the same root
            asked = httpx.post(f"{victim.url}/v1/runs/lab/jobs", json=body_of_export())
            job = asked.json()["id"]
            assert victim.died()
            assert idle.get(f"/v1/runs/lab/jobs/{job}").json()["finished"] is None
        with serving(root, job_timeout_s=1.0) as survivor:
            row = ended(survivor, job)
    as_asked("export", row, storage, tmp_path / "want")
    assert row["attempt"] == 2
    assert remains(root) == []


def body_of_export() -> dict[str, Any]:
    return {"kind": "export", "step": 1}


def test_the_points_of_jobs_are_all_tried() -> None:
    for kind in ("export", "verify", "prune"):
        assert {point for k, point, _nth in CELLS if k == kind} >= set(JOB_POINTS)
