"""The policies of docs/howto/s3.md: enough for what each process does, and nothing beyond it.

Every role works against a server that refuses what its policy does not allow. Afterwards each
action on each resource that the policy allows must have been asked for.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import pytest
from support import ranks_tiers, stock
from support.memory_engine import MemoryEngine
from support.policed_s3 import Police, PolicedS3, allows, policed_server, rights
from support.s3_server import environment_of, free_port
from support.serving import serving
from support.tiny_run import Run
from support.warm_start import start
from typer.testing import CliRunner

from ckpt import CheckpointManager, Retention, StorageError
from ckpt.cli_commands import app
from ckpt.client import Client
from ckpt.envelope import utc_now
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.registry import Registry
from ckpt.handoff.replica_poster import ReplicaPoster
from ckpt.handoff.replica_record import ReplicaRecord
from ckpt.handoff.resolve import ResolverSettings, VersionResolver
from ckpt.handoff.sync import Sidecar, SyncConfig
from ckpt.layout import replica_path
from ckpt.storage import open_storage
from ckpt.supervisor import Supervisor
from ckpt.tier import Tier

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "s3.md"
URL = "s3://bucket/prefix"
"""As the page has it."""

REFUSED = r"AccessDenied|Access Denied|Forbidden"

pytestmark = [pytest.mark.s3]

As = Callable[[str], None]


def policies() -> dict[str, dict[str, Any]]:
    """Each of the page, by its heading in lower case."""
    return {
        part.partition("\n")[0].lower(): json.loads(match[1])
        for part in PAGE.read_text("utf-8").split("\n### ")[1:]
        if (match := re.search(r"^```json\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
    }


POLICIES = policies()
STRAY = "-on-a-stray-path"
TIERED = "trainer-with-a-tier"
"""Keys of its own, so that what its uploader needs is told from what any trainer does."""


@pytest.fixture(scope="module")
def server() -> Iterator[PolicedS3]:
    # Those who stray have keys of their own, so that what they are refused counts for nobody else.
    strays = {f"{role}{STRAY}": policy for role, policy in POLICIES.items()}
    policed = {**POLICIES, **strays, TIERED: POLICIES["trainer"]}
    with policed_server(policed, free_port()) as found:
        keys = {"aws_access_key_id": "admin", "aws_secret_access_key": "x"}
        with contextlib.closing(
            boto3.client("s3", endpoint_url=found.endpoint_url, region_name="us-east-1", **keys)
        ) as client:
            client.create_bucket(Bucket="bucket")
            client.put_object(Bucket="bucket", Key="other/secret", Body=b"1")
        yield found


@pytest.fixture
def as_role(server: PolicedS3, monkeypatch: pytest.MonkeyPatch) -> As:
    """Makes every S3 client from now on, also in child processes, one of a role."""

    def become(role: str) -> None:
        for name, value in environment_of(server.endpoint_url, role, "x").items():
            monkeypatch.setenv(name, value)

    become("trainer")
    return become


def ckpt(*words: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, [*words])
    assert done.exit_code == status, done.output + done.stderr
    return done.stdout


def published(first: int, steps: int, url: str = URL, **more: Any) -> CheckpointManager:
    """A manager that has saved and published so many steps."""
    run = Run()
    manager = CheckpointManager(url, run_name="run7", retention=Retention(latest=2), **more)
    assert manager.restore(run.state) == (first - 1 if first else None)
    for step in range(first, first + steps):
        run.train(1)
        manager.save(step, run.state, publish=True)
    manager.wait()
    return manager


def told(holder: str, *, at: str) -> bytes:
    """What a sidecar says of itself."""
    return ReplicaRecord(
        holder=holder, run="run7", host="h", at=at, every_s=60.0, stopped=True, current=None,
        newest=None, engines=(),
    ).to_bytes()  # fmt: skip


def granted(role: str) -> set[tuple[str, str]]:
    return {
        (action, resource)
        for statement in POLICIES[role]["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }


def refused(server: PolicedS3, role: str) -> set[tuple[str, str]]:
    return {(one.action, one.resource) for one in server.asked(role) if not one.allowed}


def check(server: PolicedS3, role: str) -> None:
    """Nothing was refused, and nothing is allowed that was not asked for."""
    asked = server.asked(role)
    assert refused(server, role) == set()
    pairs = {(one.action, one.resource) for one in asked}
    idle = {
        (action, pattern)
        for action, pattern in granted(role)
        if not any(done == action and fnmatchcase(on, pattern) for done, on in pairs)
    }
    assert idle == set(), "allowed, and never needed"


@contextlib.contextmanager
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would be one PUT is an upload in parts, as everything above 128 MiB is."""
    with monkeypatch.context() as patch:
        for module in ("s3", "s3_create"):
            patch.setattr(f"ckpt.storage.{module}.SINGLE_PUT_BYTES", 16, raising=False)
        yield


def broken() -> Iterator[bytes]:
    """A source that fails after the first buffer."""
    yield bytes(20)
    raise StorageError("the shard is damaged")


@pytest.fixture(scope="module")
def trained(server: PolicedS3, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A root on which a trainer has done everything that trainers do."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment_of(server.endpoint_url, "trainer", "x").items():
            patch.setenv(name, value)
        published(0, 2).close()
        with small_parts(patch):
            published(2, 1).close()
            with contextlib.closing(open_storage(URL)) as store, pytest.raises(StorageError):
                store.put_stream("steps/x", broken(), 40)
        published(3, 1, storage_options={"backend": "obstore"}).close()
        ckpt("export", URL, str(folder / "adapter"))
        ckpt("import", str(folder / "adapter"), URL, "--run", "other")
        checkpoint = stock.save(stock.state_dict(*stock.model_and_optimizer()), folder / "dcp")
        ckpt("import", str(checkpoint), f"{URL}/imported", "--optimizer", "AdamW")
        ckpt("publish", URL, "--run", "again")
        ckpt("pin", URL, "--step", "3")
        ckpt("unpin", URL, "--step", "3")
        ckpt("doctor", URL, "--size", "1")
        ckpt("prune", URL, "--keep-latest", "1", "--keep-versions", "1")
        ckpt("prune", URL, "--uploads", "--older-than", "0s")
        yield


def test_the_trainer(server: PolicedS3, trained: None) -> None:
    check(server, "trainer")


def until(true: Callable[[], object], within_s: float = 30) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def unfinished(url: str) -> list[str]:
    """Whose uploads below a root nobody finished: steps and versions. They are aborted now."""
    found = json.loads(ckpt("prune", url, "--uploads", "--older-than", "0s", "--json"))
    assert not any(entry["keep"] for entry in found["entries"])
    return ["/".join(entry["path"].split("/")[:2]) for entry in found["entries"]]


def test_a_trainer_with_a_local_tier(
    server: PolicedS3, as_role: As, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its uploader, also one that dies within an upload in parts; ``mirror``; ``export`` to S3."""
    as_role(TIERED)
    url, tier = f"{URL}/tiered", tmp_path / "tier"
    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "_start", lambda self: None)
        published(0, 1, url, local_tier=tier).close()
    # The version is up; of the step a file is sent whole, and not yet an object.
    killed = start(
        ranks_tiers.upload_in_small_parts,
        str(tier),
        environment={"ARCHON_CKPT_FAULT": "object.multipart.before_complete:3=kill"},
    )
    killed.join(120)
    assert killed.exitcode == -9
    manager = published(1, 2, url, local_tier=tier)  # whose uploader goes on with what is there
    manager.wait_mirrored(120)
    manager.close()
    until(lambda: not Tier(tier, url).uploader_alive(), 120)
    with monkeypatch.context() as patch:
        patch.setattr(Supervisor, "_start", lambda self: None)
        published(3, 1, url, local_tier=tier).close()
    with small_parts(monkeypatch):
        assert "2 mirrored" in ckpt("mirror", url, str(tier))
        for _ in range(2):
            ckpt("export", url, f"{url}/out", "--overwrite")
    ckpt("verify", url)
    assert unfinished(url) == ["steps/step-00000000.w0001"]
    assert unfinished(url) == []
    assert refused(server, TIERED) == set()
    out = {one.action for one in server.asked(TIERED) if "/tiered/out/" in one.resource}
    assert out == {"s3:GetObject", "s3:PutObject", "s3:DeleteObject"}  # as the page says


def test_the_sidecar(server: PolicedS3, trained: None, as_role: As, tmp_path: Path) -> None:
    with contextlib.closing(open_storage(URL)) as store:  # one that is long gone
        store.put(replica_path("gone"), told("gone", at="2026-01-01T00:00:00+00:00"))
    as_role("sidecar")
    registry = Registry(URL, run="run7")
    cache = VersionCache(tmp_path / "cache", max_bytes=10**9)
    config = SyncConfig(run="run7", holder="here", check_s=0.1, linger_s=0.0)
    sidecar = Sidecar(registry, [MemoryEngine()], cache, config)
    stop = threading.Event()
    thread = threading.Thread(target=sidecar.run, args=(stop,), daemon=True)
    thread.start()
    poster = ReplicaPoster(registry.storage, sidecar.status, run="run7", holder="here", look_s=0.05)
    poster.start()

    def live() -> str | None:
        return sidecar.status.readiness()[1]["version"]  # type: ignore[no-any-return]

    def asked() -> set[tuple[str, str]]:
        return {
            (one.action, one.resource.split("/")[2])
            for one in server.asked("sidecar")[1:]
            if one.resource.count("/") > 1
        }

    try:
        until(lambda: live() is not None)
        first = live()
        as_role("trainer")
        published(4, 1).close()
        until(lambda: live() != first)
        until(lambda: ("s3:DeleteObject", "leases") in asked())
        until(lambda: ("s3:DeleteObject", "replicas") in asked())
    finally:
        poster.stop()
        stop.set()
        thread.join(30)
        cache.close()
        registry.close()
    check(server, "sidecar")


def test_the_service(
    server: PolicedS3, trained: None, as_role: As, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.service.jobs.runner.KEPT", 1)
    as_role("service")
    with serving(f"run7={URL}", poll_s=0.05) as http, Client(str(http.base_url)) as client:
        newest = client.latest("run7").summary.name
        list(client.steps())
        client.lease(newest, "me", 60)
        client.release(newest, "me")
        client.pin(newest)
        client.unpin(newest)
        for start in (client.verify, client.export, client.export):  # forgets the first
            assert client.wait_job(start().id, timeout_s=60).state == "succeeded"
        client.download(newest, tmp_path / "here")
        replica = "/v1/runs/run7/replicas/there"
        assert http.put(replica, content=told("there", at=utc_now())).is_success
        assert http.delete(replica).status_code == 204
        assert http.get("/readyz").status_code == 200
        (export,) = client.exports()
        assert http.delete(f"/v1/runs/run7/exports/{export.name}").status_code == 204
    with (
        small_parts(monkeypatch),
        contextlib.closing(open_storage(URL)) as store,
        pytest.raises(StorageError, match="damaged"),  # as an export that finds its step so
    ):
        store.put_stream("exports/x/adapter_model.safetensors", broken(), 40)
    check(server, "service")


def test_the_reader(server: PolicedS3, trained: None, as_role: As, tmp_path: Path) -> None:
    as_role("reader")
    ckpt("ls", URL)
    ckpt("inspect", URL)
    ckpt("verify", URL)
    version = json.loads(ckpt("versions", URL, "--json"))["versions"][0]["name"]
    ckpt("diff", URL, "3", "3")
    ckpt("diff", URL, version, "--other", f"{URL}/adapters/{version}")
    ckpt("lint", f"{URL}/adapters/{version}", status=1)  # SGLang's objection to a toy
    ckpt("export", URL, str(tmp_path / "a"))
    ckpt("export", URL, str(tmp_path / "b"), "--format", "dcp")
    resolver = VersionResolver(ResolverSettings({"run7": URL}, tmp_path / "cache", 10**9))
    assert resolver.resolve("base", Registry(URL, run="run7").latest().name).is_dir()
    check(server, "reader")


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("sidecar", "steps/x"),
        ("sidecar", "adapters/x"),
        ("sidecar", "pins/x"),
        ("service", "steps/x"),
        ("service", "writers/x"),
        ("reader", "leases/x"),
    ],
)
def test_no_role_writes_what_is_not_its_own(
    server: PolicedS3, as_role: As, role: str, path: str
) -> None:
    as_role(role + STRAY)
    with contextlib.closing(open_storage(URL)) as store:
        with pytest.raises(StorageError, match=REFUSED):
            store.put(path, b"1")
        with pytest.raises(StorageError, match=REFUSED):
            store.delete(path)


@pytest.mark.parametrize("role", POLICIES)
def test_no_role_reads_beside_its_prefix(server: PolicedS3, as_role: As, role: str) -> None:
    as_role(role + STRAY)
    with (
        contextlib.closing(open_storage("s3://bucket/other")) as store,
        pytest.raises(StorageError, match=REFUSED),
    ):
        store.read("secret")


@pytest.mark.parametrize(
    ("method", "path", "query", "wanted"),
    [
        ("GET", "/b/k", {}, ["s3:GetObject"]),
        ("HEAD", "/b", {}, ["s3:ListBucket"]),
        ("GET", "/b/", {"list-type": ["2"]}, ["s3:ListBucket"]),
        ("GET", "/b", {"uploads": [""]}, ["s3:ListBucketMultipartUploads"]),
        ("GET", "/b", {"location": [""]}, ["s3:GetBucketLocation"]),
        ("PUT", "/b/k", {"uploadId": ["1"], "partNumber": ["1"]}, ["s3:PutObject"]),
        ("POST", "/b/k", {"uploads": [""]}, ["s3:PutObject"]),
        ("DELETE", "/b/k", {"uploadId": ["1"]}, ["s3:AbortMultipartUpload"]),
        ("POST", "/b", {"delete": [""]}, ["s3:DeleteObject", "s3:DeleteObject"]),
        ("PUT", "/b", {"lifecycle": [""]}, ["s3:unknown-PUT-['lifecycle']"]),
    ],
)
def test_what_a_request_asks_for(
    method: str, path: str, query: dict[str, list[str]], wanted: list[str]
) -> None:
    body = b"<Delete><Object><Key>x</Key></Object><Object><Key>y</Key></Object></Delete>"
    found = rights(method, path, query, {}, body)
    assert [action for action, _resource in found] == wanted
    if "delete" in query:
        assert [resource for _action, resource in found] == ["arn:aws:s3:::b/x", "arn:aws:s3:::b/y"]


def test_who_may_not_list_is_told_403(server: PolicedS3) -> None:
    """As S3 does it; else a policy without ListBucket would do here and nowhere else."""
    policy = {"Statement": [{"Effect": "Allow", "Action": ["s3:GetObject"], "Resource": ["*"]}]}
    assert allows(policy, "s3:GetObject", "arn:aws:s3:::bucket/x")
    assert not allows(policy, "s3:ListBucket", "arn:aws:s3:::bucket")
    seen: list[str] = []
    police = Police(
        lambda _environ, start: start("404 Not Found", []) or [], {"a": policy}, server.log
    )
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/bucket/x", "wsgi.input": io.BytesIO(),
        "HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 Credential=a/x",
    }  # fmt: skip
    police(environ, lambda status, _headers: seen.append(status))
    environ = {**environ, "HTTP_AUTHORIZATION": "AWS4-HMAC-SHA256 Credential=admin/x"}
    police(environ, lambda status, _headers: seen.append(status))
    assert seen == ["403 Forbidden", "404 Not Found"]
