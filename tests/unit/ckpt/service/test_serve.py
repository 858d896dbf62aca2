"""The command, several services on one root, and a root on S3."""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.published import publish_one
from support.serving import serving
from typer.testing import CliRunner

from ckpt.cli_commands import app
from ckpt.envelope import seal
from ckpt.errors import ConfigError
from ckpt.job_names import job_dir, try_path
from ckpt.service import RootSpec, ServiceConfig
from ckpt.service.jobs.records import Beat, JobBook
from ckpt.service.server import Service
from ckpt.storage import open_storage


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--root", "/tmp/x", "--listen", "0.0.0.0:0"], "--token-file"),
        (["--root", "/tmp/x", "--listen", "[::]:0"], "--token-file"),
        (["--root", "/tmp/x", "--listen", "8080"], "HOST:PORT"),
        (["--root", "/tmp/x", "--listen", "example.org:80"], "an IP address"),
        (["--root", "/tmp/x", "--root", "/var/x"], "two roots are called 'x'"),
        (["--root", "lab="], "NAME=URL"),
        (["--root", "/tmp/x", "--token-file", "/nowhere"], "cannot read the tokens"),
    ],
)
def test_what_the_command_refuses(options: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["serve", *options])
    assert done.exit_code == 2
    assert said in done.output


def test_roots_have_names() -> None:
    assert RootSpec.parse("s3://bucket/some/run7/").name == "run7"
    assert RootSpec.parse("lab=/data/x").url == "/data/x"
    assert RootSpec.parse("/data/run 7.old").name == "run-7-old"
    with pytest.raises(ConfigError):
        RootSpec.parse("bad name=/data/x")


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = Service(ServiceConfig([RootSpec("lab", str(tmp_path))], port=port))
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        assert service.run() is False


def test_several_roots_do_not_mix(tmp_path: Path) -> None:
    publish_one(tmp_path / "a", "one")
    publish_one(tmp_path / "b", "two")
    with serving(tmp_path / "a", tmp_path / "b") as client:
        assert [row["run"] for row in client.get("/v1/runs").json()["runs"]] == ["a", "b"]
        assert client.get("/v1/runs/a/versions/two-v00000001").status_code == 404
        (tmp_path / "b" / "adapters").rename(tmp_path / "b" / "gone")
        assert client.get("/v1/runs/a/latest").json()["summary"]["run_name"] == "one"


def finished(client: httpx.Client, job: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        row: dict[str, Any] = client.get(f"/v1/runs/lab/jobs/{job}").json()
        if row["finished"] is not None:
            return row
        time.sleep(0.03)
    raise AssertionError(row)


def test_two_services_share_the_jobs_of_a_root(tmp_path: Path) -> None:
    root = tmp_path / "lab"
    for seed in range(3):
        publish_one(root, seed=seed)
    with serving(root, job_timeout_s=2.0) as one, serving(root, job_timeout_s=2.0) as other:
        asked = [
            client.post("/v1/runs/lab/jobs", json={"kind": "verify"}).json()["id"]
            for client in (one, other) * 3
        ]
        rows = [finished(other, job) for job in asked]
        assert [row["state"] for row in rows] == ["succeeded"] * 6
        assert [row["attempt"] for row in rows] == [1] * 6  # nobody took what another was at
        assert one.get("/v1/runs/lab/jobs").json() == other.get("/v1/runs/lab/jobs").json()
        name = publish_one(root, seed=9)
        for client in (one, other):
            assert client.get("/v1/runs/lab/latest").json()["summary"]["name"] == name


def test_a_job_of_a_machine_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "lab"
    publish_one(root)
    storage = open_storage(root)
    book = JobBook(storage)

    def begun_elsewhere(age_s: float, *, stopped: bool = False) -> str:
        job = book.create("verify", {}, "somebody").id
        who = {"number": 1, "host": "another-machine", "pid": 1, "nonce": "n"}
        storage.put_new(try_path(job, 1), seal("ckpt.try", 1, who))
        at = (datetime.now(UTC) - timedelta(seconds=age_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        book.beat(job, Beat(1, at, 5, 9, stopped))
        return job

    silent, alive, let_go = (
        begun_elsewhere(60),
        begun_elsewhere(0),
        begun_elsewhere(0, stopped=True),
    )
    with serving(root, job_timeout_s=30.0) as client:
        assert finished(client, silent)["attempt"] == 2
        assert finished(client, let_go)["attempt"] == 2
        row = client.get(f"/v1/runs/lab/jobs/{alive}").json()
        assert (row["state"], row["done"], row["total"], row["attempt"]) == ("running", 5, 9, 1)
    dead = begun_elsewhere(60)
    for number in range(2, 6):
        book.take(dead, number, "x")
    storage.delete(f"{job_dir(dead)}/beat.json")
    with serving(root, job_timeout_s=0.5) as client:
        row = finished(client, dead)
        assert (row["state"], row["error"]["type"]) == ("failed", "GaveUp")


@pytest.mark.s3
def test_a_root_on_s3(s3: Any) -> None:
    url = s3.url("served") + "/lab"
    name = publish_one(url, options=s3.storage_options)
    file = f"/v1/runs/lab/versions/{name}/files/adapter_model.safetensors"
    with serving(url, options=s3.storage_options, presign=True, poll_s=0.05) as client:
        row = client.get("/v1/runs/lab").json()
        assert (row["has_rename"], row["latest"]) == (False, {"run7": name})
        plain = client.get(file)
        assert plain.status_code == 200
        sent = client.get(file, params={"redirect": True})
        assert (sent.status_code, sent.headers["cache-control"]) == (307, "no-store")
        # The store's own certificate, which may be one that AWS_CA_BUNDLE alone vouches for.
        trusted = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))
        assert httpx.get(sent.headers["location"], verify=trusted).content == plain.content
        part = client.get(file, headers={"Range": "bytes=8-15"})
        assert part.content == plain.content[8:16]
        with client.stream("GET", "/v1/runs/lab/events?newer_than=0") as answer:
            lines = (line for line in answer.iter_lines() if line.startswith("data: "))
            assert json.loads(next(lines)[6:])["name"] == name
            newer = publish_one(url, seed=1, options=s3.storage_options)
            assert json.loads(next(lines)[6:])["name"] == newer
    with serving(url, options=s3.storage_options) as client:  # not allowed: it streams
        assert client.get(file, params={"redirect": True}).status_code == 200
