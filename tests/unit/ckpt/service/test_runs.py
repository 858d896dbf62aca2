"""What the service says of runs, steps and versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.published import damage, publish_one
from support.serving import serving
from support.steps import tiny_adapter, write_step

from ckpt.holds import pin, take_lease
from ckpt.manifest import VersionManifest
from ckpt.storage import open_storage


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with four steps and three versions."""
    path = tmp_path_factory.mktemp("runs") / "lab"
    storage = open_storage(path)
    tensors, export = tiny_adapter()
    for step in range(4):
        write_step(storage, step, tensors, export=export, world=2, metrics={"reward": step / 2})
        if step:
            publish_one(path, seed=step)
    pin(storage, "step-00000001.w0001", "the good one")
    take_lease(storage, "run7-v00000002", "replica-a", 60)
    return path


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with serving(root) as client:
        yield client


def test_runs(client: httpx.Client, root: Path) -> None:
    (run,) = client.get("/v1/runs").json()["runs"]
    assert run == client.get("/v1/runs/lab").json()
    assert run["url"] == str(root)
    assert run["latest"] == {"run7": "run7-v00000003"}
    assert run["newest_step"] == 3
    assert client.get("/v1/runs/other").status_code == 404


def test_pages_of_steps(client: httpx.Client) -> None:
    first = client.get("/v1/runs/lab/steps", params={"limit": 3}).json()
    assert [row["step"] for row in first["steps"]] == [3, 2, 1]
    assert first["total"] == 4
    row = first["steps"][2]
    assert (row["state"], row["world_size"], row["pinned"]) == ("committed", 2, True)
    assert row["metrics"] == {"reward": 0.5}
    rest = client.get("/v1/runs/lab/steps", params={"limit": 3, "before": first["next"]}).json()
    assert ([row["step"] for row in rest["steps"]], rest["next"]) == ([0], None)


def test_a_step_down_to_its_pieces(client: httpx.Client) -> None:
    shown = client.get("/v1/runs/lab/steps/2").json()
    assert client.get("/v1/runs/lab/latest-step").json()["summary"]["step"] == 3
    tensor = next(t for t in shown["tensors"] if t["name"] == "model.layers.0.wo.lora_b.weight")
    assert (tensor["shape"], len(tensor["chunks"])) == ([10, 4], 2)
    assert {file["name"] for file in shown["files"]} >= {"state.json"}
    missing = client.get("/v1/runs/lab/steps/77")
    assert missing.status_code == 404
    assert missing.json()["error"]["type"] == "NoCheckpoint"


def test_versions(client: httpx.Client) -> None:
    page = client.get("/v1/runs/lab/versions", params={"limit": 2}).json()
    assert [row["name"] for row in page["versions"]] == ["run7-v00000003", "run7-v00000002"]
    assert page["versions"][1]["held"] == "in use by replica-a"
    rest = client.get("/v1/runs/lab/versions", params={"before": page["next"]}).json()
    assert [row["number"] for row in rest["versions"]] == [1]
    shown = client.get("/v1/runs/lab/versions/run7-v00000002").json()
    sealed = VersionManifest.from_bytes(shown["manifest"].encode(), "answer")
    assert sealed.adapter_sha256 == shown["summary"]["adapter_sha256"]
    (lease,) = client.get("/v1/runs/lab/leases").json()["leases"]
    assert (lease["holder"], lease["live"]) == ("replica-a", True)


def test_what_is_damaged_is_said_so(tmp_path: Path) -> None:
    first, second = (publish_one(tmp_path, seed=seed) for seed in range(2))
    (tmp_path / "adapters" / second / "adapter_config.json").write_bytes(b"{}")
    damage(tmp_path, first)  # of the same size, so that only reading all of it shows it
    with serving(f"r={tmp_path}") as client:
        rows = client.get("/v1/runs/r/versions").json()["versions"]
        assert [row["state"] for row in rows] == ["damaged", "committed"]
        answer = client.get(f"/v1/runs/r/versions/{second}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (409, "DamagedError")
        assert client.get("/v1/runs/r/latest").json()["summary"]["name"] == first
