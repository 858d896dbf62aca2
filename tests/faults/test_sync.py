"""``ckpt sync`` under fire: real processes for sidecar, engine and store, any of them killed.

Whatever happens, an engine is never given anything but a whole, verified version.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_engine import FakeEngine
from support.fake_s3 import Spoil
from support.fault_proxy import fault_proxy
from support.published import damage, publish_one
from support.s3_server import S3Server
from support.sidecar import SidecarProcess, free_port, until

from ckpt.handoff.registry import Registry
from ckpt.peft import WEIGHTS_NAME
from ckpt.storage.faultpoints import ENVIRONMENT

LOAD = "/v1/load_lora_adapter"


def name(number: int) -> str:
    return f"run7-v{number:08d}"


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[FakeEngine]:
    with FakeEngine("vllm") as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: FakeEngine) -> FakeEngine:
    shared_engine.restart()
    return shared_engine


def loads(engine: FakeEngine) -> list[str]:
    return [item["body"]["lora_name"] for item in engine.requests(LOAD)]


def check_loads(engine: FakeEngine, registry: Registry) -> None:
    """Each directory that the engine was given holds exactly what was published."""
    for item in engine.requests(LOAD):
        version, path = registry.get(item["body"]["lora_name"]), Path(item["body"]["lora_path"])
        data = (path / WEIGHTS_NAME).read_bytes()
        assert path.name == version.name
        assert hashlib.sha256(data).hexdigest() == version.adapter_sha256


def test_from_publish_to_live_and_a_graceful_stop(engine: FakeEngine, tmp_path: Path) -> None:
    root = tmp_path / "root"
    publish_one(root)
    registry = Registry(root, run="run7")
    with SidecarProcess(root, [engine.address], tmp_path, "--linger", "0") as sidecar:
        # Once as a user starts it; the other tests fork it.
        command = [sys.executable, "-m", "ckpt.cli", *sidecar.argv[1:]]
        with sidecar.log_file.open("w") as log:
            process = subprocess.Popen(command, stderr=log)
        try:
            until(lambda: sidecar.serves(name(1)), why=sidecar.log)
            publish_one(root, seed=1)
            until(lambda: sidecar.serves(name(2)))
            until(lambda: len(registry.leases(name(2))) == 1)
            assert sidecar.get("/healthz") == (200, '{"healthy": true}\n')
            assert sidecar.metric("current_version") == 2
            assert 0 < sidecar.metric("publish_to_live_seconds") < 30
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in sidecar.log
        # The engine goes on serving it, and so its lease stands until it runs out.
        assert [lease.version for lease in registry.leases(name(2))] == [name(2)]
        before = loads(engine)
        sidecar.start()
        sidecar.until_serves(name(2))
        assert loads(engine) == before == [name(1), name(2)]
        assert sidecar.stop() == 0
    check_loads(engine, registry)


@pytest.mark.s3
@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "point",
    [
        "posix.put.mid_write:2",
        "posix.put.before_rename:2",
        "posix.put.after_rename:3",
        "posix.rename_dir.before",
        "posix.rename_dir.after",
    ],
)
def test_a_sidecar_killed_in_mid_pull_starts_again_clean(
    point: str, s3: S3Server, engine: FakeEngine, tmp_path: Path
) -> None:
    url = s3.url()
    publish_one(url, options=s3.storage_options)
    registry = Registry(url, run="run7", storage_options=s3.storage_options)
    with SidecarProcess(url, [engine.address], tmp_path) as sidecar:
        sidecar.start(**{ENVIRONMENT: f"{point}=kill"})
        assert sidecar.wait() == -signal.SIGKILL
        there = point.endswith("rename_dir.after")
        assert [item.startswith(".tmp-") for item in sidecar.cached()] == [not there]
        assert loads(engine) == []
        sidecar.start()
        sidecar.until_serves(name(1))
        assert sidecar.cached() == [name(1)]
        assert sidecar.metric("pulls_total") == (0 if there else 1)
        check_loads(engine, registry)
        sidecar.stop()
    registry.close()


def test_a_sidecar_killed_during_a_load_finds_out_what_became_of_it(
    engine: FakeEngine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    publish_one(root)
    engine.faults({"at": "load", "do": "hang", "seconds": 1.0, "times": 1})
    with SidecarProcess(root, [engine.address], tmp_path) as sidecar:
        sidecar.start()
        until(lambda: loads(engine), why=sidecar.log)
        sidecar.kill()
        sidecar.start()
        sidecar.until_serves(name(1))
        sidecar.stop()
    check_loads(engine, Registry(root, run="run7"))


def test_an_engine_that_is_killed_is_brought_back(engine: FakeEngine, tmp_path: Path) -> None:
    root = tmp_path / "root"
    publish_one(root)
    with SidecarProcess(root, [engine.address], tmp_path) as sidecar:
        sidecar.start()
        sidecar.until_serves(name(1))
        engine.kill()
        until(lambda: sidecar.get("/readyz")[0] == 503)
        assert sidecar.get("/healthz")[0] == 200
        publish_one(root, seed=1)  # while it is away
        until(lambda: name(2) in sidecar.cached())
        engine.start()
        sidecar.until_serves(name(2))
        sidecar.stop()
    check_loads(engine, Registry(root, run="run7"))


def test_a_damaged_version_is_skipped_with_a_message(engine: FakeEngine, tmp_path: Path) -> None:
    root = tmp_path / "root"
    publish_one(root)
    with SidecarProcess(root, [engine.address], tmp_path) as sidecar:
        sidecar.start()
        sidecar.until_serves(name(1))
        os.kill(sidecar.process.pid, signal.SIGSTOP)
        damage(root, publish_one(root, seed=1))
        os.kill(sidecar.process.pid, signal.SIGCONT)
        until(lambda: f"{name(2)} is passed over" in sidecar.log)
        assert sidecar.serves(name(1))
        assert f'"{name(2)}": "' in sidecar.get("/readyz")[1]
        assert name(2) not in sidecar.cached()
        publish_one(root, seed=2)
        sidecar.until_serves(name(3))
        assert loads(engine) == [name(1), name(3)]
        sidecar.stop()


def test_the_cache_stays_within_its_bound_and_holds_what_is_loaded(
    engine: FakeEngine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    publish_one(root)
    bound = 3 * Registry(root, run="run7").get(1).bytes
    options = ("--max-size", str(bound), "--grace", "0", "--linger", "0")
    with SidecarProcess(root, [engine.address], tmp_path, *options) as sidecar:
        sidecar.start()
        sidecar.until_serves(name(1))
        for seed in range(1, 6):
            publish_one(root, seed=seed)
            sidecar.until_serves(name(seed + 1))
            assert sidecar.metric("cache_bytes") <= bound
            assert name(seed + 1) in sidecar.cached()
        assert sidecar.metric("cache_evictions_total") >= 2
        sidecar.stop()


def test_a_second_sidecar_keeps_off_the_cache_of_the_first(
    engine: FakeEngine, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    publish_one(root)
    with SidecarProcess(root, [engine.address], tmp_path) as sidecar:
        sidecar.start()
        sidecar.until_serves(name(1))
        with SidecarProcess(root, [engine.address], tmp_path) as second:
            second.start()
            assert second.wait() == 2
            assert "in use by another process" in second.log
        assert sidecar.serves(name(1))
        sidecar.stop()


@pytest.mark.s3
def test_store_errors_and_torn_uploads_never_reach_the_engine(
    s3: S3Server, engine: FakeEngine, tmp_path: Path
) -> None:
    url = s3.url()
    weights, manifest = {"key": WEIGHTS_NAME}, {"key": "MANIFEST.json"}
    spoilt = [
        [Spoil("GET", "drop", **manifest)],
        [Spoil("GET", "truncate", **weights)],
        [Spoil("GET", "reset", **weights)],
        [Spoil("GET", "flip", **weights)],
        [Spoil("PUT", "status", (500, "InternalError"), times=2, key="leases/")],
        # Until the client gives up: the sidecar itself has to come back.
        [Spoil("GET", "status", (503, "SlowDown"), times=7)],
    ]
    registry = Registry(url, run="run7", storage_options=s3.storage_options)
    with fault_proxy(s3.endpoint_url) as proxy, contextlib.closing(s3.client()) as client:
        options = ("--endpoint-url", proxy.url)
        with SidecarProcess(url, [engine.address], tmp_path, *options) as sidecar:
            sidecar.start()
            good = []
            for spoils in spoilt:
                proxy.spoils = spoils
                good.append(publish_one(url, seed=len(good), options=s3.storage_options))
                sidecar.until_serves(good[-1])
            # A publisher that dies leaves half of its files and no manifest; one whose store loses
            # bytes leaves a manifest that they do not fit.
            torn = int(good[-1][-8:]) + 1
            prefix = f"{url.removeprefix(f's3://{s3.bucket}/')}/adapters"
            client.put_object(Bucket=s3.bucket, Key=f"{prefix}/{name(torn)}.claim.json", Body=b"x")
            key = f"{prefix}/{name(torn)}/{WEIGHTS_NAME}"
            client.put_object(Bucket=s3.bucket, Key=key, Body=b"half of it")
            until(lambda: sidecar.metric("newest_version") == torn)
            os.kill(sidecar.process.pid, signal.SIGSTOP)
            cut = publish_one(url, seed=20, options=s3.storage_options)
            key = f"{prefix}/{cut}/{WEIGHTS_NAME}"
            client.put_object(Bucket=s3.bucket, Key=key, Body=b"half of it")
            os.kill(sidecar.process.pid, signal.SIGCONT)
            until(lambda: f"{cut} is passed over" in sidecar.log)
            assert sidecar.serves(good[-1])
            good.append(publish_one(url, seed=21, options=s3.storage_options))
            sidecar.until_serves(good[-1])
            assert sidecar.stop() == 0
            assert loads(engine) == good
            assert "Traceback" not in sidecar.log
    check_loads(engine, registry)
    registry.close()


@contextlib.contextmanager
def moto(port: int) -> Iterator[None]:
    """An S3 server on a port; killed at the end of the block, and all it held is lost."""
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    try:
        until(answers, why="moto did not start")
        yield
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.mark.s3
def test_a_store_that_stops_and_comes_back_costs_nothing_that_is_served(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "access-key-of-tests",
        "AWS_SECRET_ACCESS_KEY": "secret-key-of-tests",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    server = S3Server(environment["AWS_ENDPOINT_URL"], "bucket", environment)
    with SidecarProcess("s3://bucket/run7", [engine.address], tmp_path) as sidecar:
        with moto(port), contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket="bucket")
            publish_one("s3://bucket/run7", options=server.storage_options)
            sidecar.start()
            sidecar.until_serves(name(1))
            keys = [item["Key"] for item in client.list_objects_v2(Bucket="bucket")["Contents"]]
            kept = {key: client.get_object(Bucket="bucket", Key=key)["Body"].read() for key in keys}
        until(lambda: sidecar.metric("store_up") == 0, why=sidecar.log)
        assert sidecar.serves(name(1))
        engine.restart()  # the engine loses its adapters while the store is away
        until(lambda: loads(engine) == [name(1)])
        sidecar.until_serves(name(1))
        sidecar.kill()  # and so does the sidecar its process
        engine.restart()
        sidecar.start()
        sidecar.until_serves(name(1))
        assert sidecar.get("/healthz")[0] == 200
        with moto(port), contextlib.closing(server.client()) as client:
            client.create_bucket(Bucket="bucket")
            for key, body in kept.items():
                client.put_object(Bucket="bucket", Key=key, Body=body)
            publish_one("s3://bucket/run7", seed=1, options=server.storage_options)
            sidecar.until_serves(name(2))
            began = time.monotonic()
            assert sidecar.stop() == 0
            assert time.monotonic() - began < 15
