"""The client, and what works over a service as it does over a root."""

from __future__ import annotations

import asyncio
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.published import damage, publish_one
from support.serving import ADMIN, LEASE, READ, serving, tokens
from support.steps import tiny_adapter, write_step
from typer.testing import CliRunner

from ckpt.cli_commands import app
from ckpt.client import AsyncClient, Client
from ckpt.consolidate import consolidate
from ckpt.errors import (
    ConfigError,
    DamagedError,
    HandoffTimeout,
    NoCheckpoint,
    ReadOnly,
    StorageError,
)
from ckpt.handoff import Registry
from ckpt.storage import open_storage
from ckpt.storage.http_session import Address, error_of, find_token


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("client")
    storage = open_storage(path / "lab")
    tensors, export = tiny_adapter()
    for step in range(3):
        write_step(storage, step, tensors, export=export, world=2)
        publish_one(path / "lab", seed=step)
    return path


@pytest.fixture(scope="module")
def url(place: Path) -> Iterator[str]:
    with serving(place / "lab", tokens=tokens(place), job_timeout_s=1.0) as client:
        yield str(client.base_url).rstrip("/")


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, token=ADMIN) as client:
        yield client


def test_what_there_is(client: Client) -> None:
    assert [row.run for row in client.runs()] == ["lab"]
    assert client.run().latest == {"run7": "run7-v00000003"}
    assert [row.step for row in client.steps()] == [2, 1, 0]
    assert [row.step for row in client.steps(newest=2)] == [2, 1]
    assert client.step(1).summary.world_size == 2
    assert client.step().summary.step == 2
    assert [row.number for row in client.versions()] == [3, 2, 1]
    assert client.latest().summary.name == "run7-v00000003"
    with pytest.raises(NoCheckpoint):
        client.step(9)
    with pytest.raises(NoCheckpoint):
        client.latest("other")


def test_pages_are_put_together(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.client.sync_client.PAGE", 2)
    assert [row.number for row in client.versions()] == [3, 2, 1]
    assert [row.step for row in client.steps(newest=3)] == [2, 1, 0]


def test_leases_and_pins(client: Client) -> None:
    taken = client.lease("run7-v00000001", "reader", 60)
    assert (taken.live, client.leases("run7-v00000001")) == (True, [taken])
    client.release("run7-v00000001", "reader")
    assert client.leases() == []
    assert client.pin("step-00000001.w0001", "why").note == "why"
    assert [pin.name for pin in client.pins()] == ["step-00000001.w0001"]
    client.unpin("step-00000001.w0001")
    with pytest.raises(NoCheckpoint):
        client.unpin("step-00000001.w0001")


def test_a_job_from_the_first_word_to_the_last(client: Client) -> None:
    job = client.export(1, dtype="float32")
    row = client.wait_job(job.id, timeout_s=20)
    assert (row.state, row.by) == ("succeeded", "operator")
    assert [made.name for made in client.exports()] == ["step-00000001.w0001-float32"]
    assert client.jobs()[0].id == job.id
    assert client.cancel(job.id).state == "succeeded"  # it has ended, and stays so
    plan = client.wait_job(client.prune(keep_versions=5).id, timeout_s=20).result
    assert plan is not None
    assert plan["dry_run"] is True
    verified = client.wait_job(client.verify(step=2).id, timeout_s=20)
    assert verified.result is not None
    assert verified.result["ok"] is True


def test_the_async_client_says_the_same(url: str, client: Client, tmp_path: Path) -> None:
    async def ask() -> None:
        async with AsyncClient(url, token=ADMIN) as other:
            assert await other.runs() == client.runs()
            assert await other.run() == client.run()
            assert [row async for row in other.steps()] == list(client.steps())
            assert await other.step(1) == client.step(1)
            assert [row async for row in other.versions(newest=2)] == list(client.versions())[:2]
            assert await other.version("run7-v00000001") == client.version("run7-v00000001")
            assert await other.latest() == client.latest()
            assert (await other.wait(2, timeout_s=5)).summary.number == 3
            with pytest.raises(HandoffTimeout):
                await other.wait(3, timeout_s=0.05)
            taken = await other.lease("run7-v00000001", "reader", 60)
            assert await other.leases("run7-v00000001") == [taken]
            await other.release("run7-v00000001", "reader")
            await other.pin("run7-v00000001", "n")
            assert [pin.note for pin in await other.pins()] == ["n"]
            await other.unpin("run7-v00000001")
            for started in (
                await other.export(2),
                await other.verify(version="run7-v00000001"),
                await other.prune(keep_latest=9),
            ):
                row = await other.wait_job(started.id, timeout_s=20)
                assert row.state == "succeeded"
                assert await other.job(row.id) == client.job(row.id)
            assert await other.exports() == client.exports()
            assert await other.jobs(2) == client.jobs(2)
            assert (await other.cancel(row.id)).state == "succeeded"
            copy = await other.download(2, tmp_path)
            assert copy == tmp_path / "run7-v00000002"
            events = other.events(newer_than=1)
            names = [(await anext(events)).name for _ in range(2)]
            assert names == ["run7-v00000002", "run7-v00000003"]

    asyncio.run(ask())


def test_both_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:  # "over" is for the commands
        return {name for name in dir(kind) if not name.startswith("_")} - {"over"}

    assert public(Client) == public(AsyncClient)


def test_events_come_once_each_over_lost_connections(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "events"
    publish_one(root, seed=0)
    seen: list[str] = []

    def follow(base: str) -> None:
        with Client(base) as client:
            for event in client.events(newer_than=0):
                seen.append(event.name)
                if event.name == "run7-v00000004":
                    return

    with serving(root) as first:
        base = str(first.base_url)
        thread = threading.Thread(target=follow, args=(base,), daemon=True)
        thread.start()
        publish_one(root, seed=1)
        until(lambda: len(seen) == 2)
    port = int(base.rstrip("/").rpartition(":")[2])
    publish_one(root, seed=2)  # while no service answers
    with serving(root, port=port):
        until(lambda: len(seen) == 3)
        publish_one(root, seed=3)
        thread.join(20)
    assert seen == [f"run7-v0000000{n}" for n in (1, 2, 3, 4)]


def until(true: Callable[[], bool], within_s: float = 20) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- a registry and a store over a service ------------------------------------------------------


def test_a_registry_is_that_of_the_root(url: str, place: Path, tmp_path: Path) -> None:
    here = Registry(place / "lab")
    there = Registry(f"{url}/runs/lab", storage_options={"token": LEASE})

    def same(a: Any, b: Any) -> bool:
        return bool((a.name, a.adapter_sha256, a.files) == (b.name, b.adapter_sha256, b.files))

    newest, other = here.latest(), there.latest()
    assert newest is not None
    assert other is not None
    assert same(newest, other)
    assert same(there.get(2), here.get(2))
    assert [v.name for v in there.newer_than(1)] == [v.name for v in here.newer_than(1)]
    assert same(there.wait_for(2, timeout=5), newest)
    with pytest.raises(HandoffTimeout):
        there.wait_for(3, timeout=0.05)
    there.lease(1, "far", 60)
    assert [lease.holder for lease in here.leases(1)] == ["far"]
    there.release(1, "far")
    assert here.leases(1) == []
    copy = there.fetch(3, tmp_path)
    want = place / "lab" / "adapters" / "run7-v00000003"
    for file in copy.iterdir():
        assert file.read_bytes() == (want / file.name).read_bytes()


def test_a_damaged_version_is_refused_here(tmp_path: Path) -> None:
    damage(tmp_path / "lab", publish_one(tmp_path / "lab"))
    with serving(tmp_path / "lab") as client, Client(str(client.base_url)) as remote:
        with pytest.raises(DamagedError):
            remote.download(1, tmp_path / "cache")
        assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_is_only_read(url: str, place: Path) -> None:
    storage = open_storage(url, {"token": ADMIN})
    local = open_storage(place / "lab")
    assert storage.has_rename is True
    path = "steps/step-00000001.w0001/state.json"
    data = local.read(path)
    assert storage.read(path) == data
    assert storage.read(path, 3) == data[3:]
    assert storage.read(path, 3, 9) == data[3:9]
    assert storage.read(path, 4, 4) == b""
    buffer = bytearray(5)
    storage.read_into(path, 2, memoryview(buffer))
    assert bytes(buffer) == data[2:7]
    with pytest.raises(StorageError, match="too short"):
        storage.read(path, 0, len(data) + 1)
    assert storage.list("adapters") == local.list("adapters")
    assert storage.exists("adapters/nothing") is False
    for change in (
        lambda: storage.put("pins/x.json", b""),
        lambda: storage.put_new("steps/x", b""),
        lambda: storage.put_stream("steps/x", [], 0),
        lambda: storage.delete("steps/x"),
        lambda: storage.delete_tree("steps"),
        lambda: storage.rename_dir("steps", "gone"),
    ):
        with pytest.raises(ReadOnly):
            change()
    again = pickle.loads(pickle.dumps(storage))
    assert again.read(path) == data


# --- the commands -------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_commands_work_over_a_service(
    url: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_TOKEN", ADMIN)
    root, far = str(place / "lab"), f"{url}/runs/lab"
    for arguments in (
        ["ls"],
        ["inspect"],
        ["inspect", "--step", "1"],
        ["inspect", "--version", "run7-v00000002"],
        ["verify"],
        ["versions", "--newest", "2"],
        ["versions", "--newer-than", "2", "--wait", "5"],
    ):
        name, *more = arguments
        here, there = (command(name, where, *more, "--json") for where in (root, far))
        for document in (here, there):
            document.pop("url", None)
        assert there == here, arguments
    command("export", far, str(tmp_path / "far"), "--step", "1", "--json")
    consolidate(root, 1, tmp_path / "near")
    for file in (tmp_path / "near").iterdir():
        assert (tmp_path / "far" / file.name).read_bytes() == file.read_bytes()
    assert command("pin", far, "--step", "1", "--json")["pinned"] == "step-00000001.w0001"
    assert command("unpin", far, "--step", "1", "--json") == {"unpinned": ["step-00000001.w0001"]}
    refused = CliRunner().invoke(app, ["publish", far, "--step", "1"])
    assert refused.exit_code == 2
    assert "only read" in refused.output


def test_a_prune_over_a_service_is_a_job_with_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        publish_one(tmp_path / "lab", seed=seed)
    rules = ["--keep-versions", "2", "--json"]
    with serving(tmp_path / "lab", job_timeout_s=1.0) as client:
        far = str(client.base_url)
        shown = command("prune", far, *rules, "--dry-run")
        assert [row["keep"] for row in shown["entries"]] == [False, False, True, True]
        here = command("prune", str(tmp_path / "lab"), *rules, "--dry-run")
        assert shown["entries"] == here["entries"]
        assert len(command("versions", far, "--json")["versions"]) == 4
        command("prune", far, *rules)
        left = command("versions", far, "--json")["versions"]
        assert [row["number"] for row in left] == [3, 4]


# --- addresses, tokens, errors ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "base", "run"),
    [
        ("http://h:1", "http://h:1", None),
        ("https://h/", "https://h", None),
        ("https://h/runs/lab", "https://h", "lab"),
        ("https://h/v1/runs/lab/", "https://h", "lab"),
        ("https://h/ckpt/runs/lab", "https://h/ckpt", "lab"),
        ("https://h/ckpt/v1", "https://h/ckpt", None),
    ],
)
def test_addresses(url: str, base: str, run: str | None) -> None:
    assert Address.parse(url) == Address(base, run)


@pytest.mark.parametrize("url", ["http://", "ftp://h", "https://me:secret@h", "https://h?x=secret"])
def test_an_address_without_secrets(url: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Address.parse(url)
    assert "me:secret" not in str(refused.value) or "credentials" not in str(refused.value)


def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{READ}\n")
    assert find_token({"token_file": tmp_path / "token"}) == READ
    monkeypatch.setenv("CKPT_TOKEN_FILE", str(tmp_path / "token"))
    assert find_token({}) == READ
    monkeypatch.setenv("CKPT_TOKEN", LEASE)
    assert find_token({}) == LEASE
    assert find_token({"token": ADMIN}) == ADMIN
    with pytest.raises(ConfigError, match="cannot read"):
        find_token({"token_file": tmp_path / "none"})
    with pytest.raises(ConfigError) as refused:
        find_token({"token": "line\nbreak"})
    assert "line" not in str(refused.value)


def test_a_token_that_is_not_enough(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_TOKEN", raising=False)
    for token, said in ((None, "401|token"), ("x" * 20, "token"), (READ, "scope")):
        with Client(f"{url}/runs/lab", token=token) as client, pytest.raises(StorageError) as no:
            client.pin("run7-v00000001")
        assert "CKPT_TOKEN" in str(no.value), said


def answers(*given: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[httpx.Request]]:
    """A transport that gives these answers, one after the other; and what it was asked."""
    asked: list[httpx.Request] = []
    left = list(given)

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    return httpx.MockTransport(handle), asked


RUNS = httpx.Response(200, json={"runs": []})


def test_what_may_pass_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.http_session.FIRST_PAUSE_S", 0.001)
    transport, asked = answers(
        httpx.Response(503, headers={"Retry-After": "0"}),
        httpx.ReadError("reset"),
        httpx.Response(429),
        RUNS,
    )
    with Client("http://h/runs/lab", token=READ, transport=transport) as client:
        assert client.runs() == []
    assert len(asked) == 4


def test_a_job_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.http_session.FIRST_PAUSE_S", 0.001)
    for lost in (httpx.ReadError("reset"), httpx.Response(503), httpx.Response(502)):
        transport, asked = answers(lost, RUNS)
        client = Client("http://h/runs/lab", transport=transport)
        with pytest.raises(StorageError):
            client.verify()
        assert len(asked) == 1


def test_there_is_a_deadline() -> None:
    transport, _asked = answers(*[httpx.Response(503)] * 1000)
    client = Client("http://h/runs/lab", transport=transport, timeout_s=0.3)
    begun = time.monotonic()
    with pytest.raises(StorageError):
        client.runs()
    assert time.monotonic() - begun < 5


def test_a_redirect_takes_no_token_elsewhere() -> None:
    away = httpx.Response(307, headers={"Location": "http://evil.example/"})
    transport, asked = answers(away)
    client = Client("http://h/runs/lab", token=READ, transport=transport)
    with pytest.raises(StorageError):
        client.runs()
    assert [request.url.host for request in asked] == ["h"]


def test_what_a_proxy_answers_is_an_error_too() -> None:
    assert isinstance(error_of(502, b"<html>bad gateway</html>", "x"), StorageError)
    assert isinstance(error_of(418, b"[]", "x"), ConfigError)
    named = error_of(409, b'{"error":{"type":"DamagedError","message":"m"}}', "x")
    assert isinstance(named, DamagedError)
    odd = error_of(404, b'{"error":{"type":"SystemExit","message":"m"}}', "x")
    assert isinstance(odd, StorageError)
    transport, _ = answers(httpx.Response(200, json={"runs": 5}))
    with pytest.raises(DamagedError, match="not an answer"):
        Client("http://h/runs/lab", transport=transport).runs()


def test_a_root_can_be_read_without_the_service_packages() -> None:
    code = "import sys, ckpt.client; print({'fastapi', 'uvicorn', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
