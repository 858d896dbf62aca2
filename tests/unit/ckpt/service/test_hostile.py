"""Slow, oversized and malformed requests over real sockets; floods; and the end of a service."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from support.published import publish_one
from support.serving import ADMIN, READ, as_, serving, tokens

from ckpt.service import Limits
from ckpt.service.limits import RateLimit
from ckpt.service.server import JsonLines

BOUNDS = Limits(
    head_s=0.4, body_s=0.4, send_s=0.5, body_bytes=4096, connections=40, waiting=3, downloads=2
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "lab"
    publish_one(path)
    return path


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with serving(root, limits=BOUNDS) as client:
        yield client


@contextmanager
def connection(client: httpx.Client) -> Iterator[socket.socket]:
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as opened:
        yield opened


def answer_to(client: httpx.Client, data: bytes) -> bytes:
    """All that comes back until the service closes the connection."""
    with connection(client) as opened:
        opened.sendall(data)
        try:
            return b"".join(iter(lambda: opened.recv(65536), b""))
        except ConnectionResetError:
            return b""


def works(client: httpx.Client) -> bool:
    return client.get("/v1/runs/lab/latest").status_code == 200


HEAD = b"POST /v1/runs/lab/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GET",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal",  # the second one never ends
    ],
)
def test_a_head_that_does_not_come_in_time(client: httpx.Client, data: bytes) -> None:
    begun = time.monotonic()
    answer_to(client, data)
    assert time.monotonic() - begun < 5
    assert works(client)


def test_a_head_byte_by_byte(client: httpx.Client) -> None:
    begun = time.monotonic()
    with connection(client) as opened, contextlib.suppress(OSError):
        for byte in b"GET /healthz HTTP/1.1\r\nX-Slow: " + b"a" * 1000:
            opened.sendall(bytes([byte]))  # fails once the service has closed
            time.sleep(0.02)
    assert time.monotonic() - begun < 5


def test_a_body_that_does_not_come_in_time(client: httpx.Client) -> None:
    answer = answer_to(client, HEAD + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408 ")
    chunked = answer_to(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    assert chunked.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_is_too_long(client: httpx.Client) -> None:
    said = answer_to(client, HEAD + b"Content-Length: 5000\r\n\r\n" + b" " * 5000)
    assert said.startswith(b"HTTP/1.1 413 ")
    chunk = b"800\r\n" + b" " * 2048 + b"\r\n"
    streamed = answer_to(client, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 3)
    assert streamed.startswith(b"HTTP/1.1 413 ")
    fits = answer_to(
        client, HEAD + b"Connection: close\r\nContent-Length: 4096\r\n\r\n" + b" " * 4096
    )
    assert fits.startswith(b"HTTP/1.1 422 ")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",  # TLS
        b"HELLO\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nNo colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request(client: httpx.Client, data: bytes) -> None:
    answer = answer_to(client, data)
    assert answer == b"" or answer.split(b" ")[1] in {b"400", b"403", b"408", b"413", b"431"}
    assert works(client)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"kind":', b"\xff\xfe", b"[" * 4000])
def test_a_body_that_is_no_job(client: httpx.Client, body: bytes) -> None:
    kind = {"Content-Type": "application/json"}
    answer = client.post("/v1/runs/lab/jobs", content=body, headers=kind)
    assert answer.status_code in {400, 422}
    assert answer.json()["error"]["message"]


def test_a_path_that_is_too_long(client: httpx.Client) -> None:
    assert client.get("/v1/runs/" + "a" * 5000).status_code == 414
    assert client.get("/v1/runs", params={"x": "a" * 5000}).status_code == 414


def test_a_reader_that_does_not_read_gives_its_place_up(tmp_path: Path) -> None:
    (tmp_path / "lab" / "steps" / "step-00000001.w0001").mkdir(parents=True)
    big = tmp_path / "lab" / "steps" / "step-00000001.w0001" / "shard-00000-of-00001.safetensors"
    with big.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    path = f"/v1/runs/lab/files/{big.relative_to(tmp_path / 'lab')}"
    with serving(tmp_path / "lab", limits=BOUNDS) as client:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        with connection(client) as one, connection(client) as other:
            for opened in (one, other):
                opened.sendall(request)
                assert opened.recv(1024).startswith(b"HTTP/1.1 200")
            busy = client.get(path)
            assert (busy.status_code, busy.headers["retry-after"]) == (503, "1")
            some = {"Range": "bytes=0-1"}
            settles(lambda: client.get(path, headers=some).status_code == 206)


def test_only_so_many_may_wait(client: httpx.Client) -> None:
    url = "/v1/runs/lab/wait?newer_than=9&timeout_s="
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            opened = stack.enter_context(connection(client))
            opened.sendall(f"GET {url}30 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        # Asked of the numbers: another wait of ours could take the place of one of the three.
        settles(lambda: 'ckpt_waiting{root="lab"} 3.0' in client.get("/metrics").text)
        assert client.get(f"{url}0").status_code == 503
        assert works(client)  # others are served all the same
    settles(lambda: client.get(f"{url}0").status_code == 204)  # whoever goes gives his place up


def settles(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_only_so_many_may_be_connected(root: Path) -> None:
    with serving(root, limits=Limits(connections=20)) as client:
        place = (client.base_url.host, client.base_url.port or 0)
        opened = [socket.create_connection(place) for _ in range(30)]
        try:
            with httpx.Client(base_url=client.base_url) as late:
                assert late.get("/healthz").status_code == 503
        finally:
            for one in opened:
                one.close()
        deadline = time.monotonic() + 10
        while client.get("/healthz").status_code == 503:
            assert time.monotonic() < deadline


def test_a_caller_has_a_budget(root: Path, tmp_path: Path) -> None:
    limits = Limits(per_second=20, burst=30)
    with serving(root, limits=limits, tokens=tokens(tmp_path)) as client:
        statuses = [client.get("/v1/runs/x", headers=as_(READ)).status_code for _ in range(60)]
        assert set(statuses) == {404, 429}
        refused = client.get("/v1/runs/x", headers=as_(READ))
        assert int(refused.headers["retry-after"]) >= 1
        # Another token has a budget of its own.
        assert client.get("/v1/runs/x", headers=as_(ADMIN)).status_code == 404


def test_a_budget_fills_up() -> None:
    now = [0.0]
    limit = RateLimit(10, 2, clock=lambda: now[0])
    assert [limit.wait_s("a"), limit.wait_s("a")] == [0, 0]
    assert limit.wait_s("a") == pytest.approx(0.1)
    assert limit.wait_s("b") == 0
    now[0] = 0.15
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


def test_no_token_is_ever_logged(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serving(root, tokens=tokens(tmp_path)) as client:
        secret = "guess-0123456789abcdef"
        client.get("/v1/runs", headers=as_(READ))
        client.get("/v1/runs", headers=as_(secret))
        client.get(f"/v1/runs?token={secret}", headers={"Cookie": f"ckpt_token={READ}"})
        client.get("/v1/runs", headers={"Authorization": f"Basic {secret}"})
        client.post("/v1/runs/lab/jobs", content=secret, headers=as_(ADMIN))
        told = client.get("/metrics", headers=as_(READ)).text
    ours = [r for r in caplog.records if not r.name.startswith("http")]  # the test's own client
    lines = [JsonLines().format(record) for record in ours]
    assert any(json.loads(line).get("request", {}).get("caller") == "fleet" for line in lines)
    for text in (*lines, told):
        assert secret not in text
        assert READ not in text
        assert ADMIN not in text


def test_what_is_logged_of_a_request(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ckpt.service.access"), serving(root) as client:
        answer = client.get('/v1/runs/%0a{"forged": 1}')
    (record,) = [r for r in caplog.records if r.name == "ckpt.service.access"]
    line = JsonLines().format(record)
    assert "\n" not in line
    facts = json.loads(line)["request"]
    assert facts["id"] == answer.headers["x-request-id"]
    assert (facts["method"], facts["status"]) == ("GET", answer.status_code)
    assert facts["ms"] >= 0


def test_a_service_that_stops_lets_those_go_who_wait(root: Path) -> None:
    ended: dict[str, str] = {}

    def wait(base: str) -> None:
        answer = httpx.get(f"{base}/v1/runs/lab/wait?newer_than=9&timeout_s=60", timeout=60)
        ended["wait"] = str(answer.status_code)

    def follow(base: str) -> None:
        with httpx.stream("GET", f"{base}/v1/runs/lab/events", timeout=60) as answer:
            ended["events"] = "".join(answer.iter_text())

    with serving(root) as client:
        base = str(client.base_url).rstrip("/")
        threads = [threading.Thread(target=target, args=(base,)) for target in (wait, follow)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while 'ckpt_waiting{root="lab"} 2.0' not in client.get("/metrics").text:
            assert time.monotonic() < deadline
        begun = time.monotonic()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - begun < 5
    assert ended["wait"] == "204"
    assert ended["events"].endswith("event: bye\ndata: {}\n\n")


def test_a_service_that_stops_waits_for_nobody_for_ever(tmp_path: Path) -> None:
    big = tmp_path / "lab" / "steps" / "step-00000001.w0001" / "shard-00000-of-00001.safetensors"
    big.parent.mkdir(parents=True)
    with big.open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    path = f"/v1/runs/lab/files/{big.relative_to(tmp_path / 'lab')}"
    with contextlib.ExitStack() as stack:
        with serving(tmp_path / "lab") as client:
            stuck = stack.enter_context(connection(client))
            stuck.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert stuck.recv(1024).startswith(b"HTTP/1.1 200")
            slow = stack.enter_context(connection(client))
            slow.sendall(b"GET /healthz HTTP/1.1\r\n")
            begun = time.monotonic()
        assert time.monotonic() - begun < 15  # two seconds to drain, and what a busy machine adds
