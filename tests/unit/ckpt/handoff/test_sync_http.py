"""The sidecar's HTTP window: three paths, bounded, closed to strangers."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import ConfigError
from ckpt.handoff import sync_http
from ckpt.handoff.sync_http import Listen, SyncServer, read_token

TOKEN = "correct-horse-battery-staple"


class Window:
    fine = True

    def health(self) -> tuple[bool, dict[str, Any]]:
        return self.fine, {"healthy": self.fine}

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        return self.fine, {"ready": self.fine}

    def metrics(self) -> str:
        return "a 1\n"


@contextlib.contextmanager
def served(token: str | None = None, window: Window | None = None) -> Iterator[int]:
    server = SyncServer(Listen.parse("127.0.0.1:0", token), window or Window())
    server.start()
    try:
        yield server.address[1]
    finally:
        server.close()


def send(port: int, data: bytes, *, patience: float = 10) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=patience) as connection:
        with contextlib.suppress(OSError):  # it may close before all is sent
            connection.sendall(data)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                answer += piece
        return answer


def get(port: int, path: str, *headers: str, method: str = "GET") -> tuple[int, str]:
    lines = [f"{method} {path} HTTP/1.1", *(headers or ("Host: 127.0.0.1",)), "", ""]
    head, _, body = send(port, "\r\n".join(lines).encode("latin-1")).partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, body.decode()


def test_three_paths_and_no_other() -> None:
    window = Window()
    with served(window=window) as port:
        assert get(port, "/metrics") == (200, "a 1\n")
        assert get(port, "/healthz") == (200, '{"healthy": true}\n')
        assert get(port, "/readyz") == (200, '{"ready": true}\n')
        assert get(port, "/metrics", "Host: localhost:9101", method="HEAD") == (200, "")
        window.fine = False
        assert get(port, "/healthz")[0] == 503
        assert json.loads(get(port, "/readyz")[1]) == {"ready": False}
        for path in ("/", "/metrics/", "/metrics?x=1", "/../metrics", "/%6detrics"):
            assert get(port, path)[0] == 404, path
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT"):
            assert get(port, "/metrics", method=method)[0] == 501, method


def test_with_a_token_everything_needs_it() -> None:
    with served(TOKEN) as port:
        right = f"Authorization: Bearer {TOKEN}"
        for path in ("/metrics", "/healthz", "/readyz"):
            assert get(port, path, right, "Host: any.example")[0] == 200
            for wrong in (
                "Authorization: Bearer wrong",
                f"Authorization: Bearer {TOKEN}x",
                f"Authorization: Bearer {TOKEN[:-1]}",
                f"Authorization: Basic {TOKEN}",
                "Authorization: Bearer é",
                f"Authorization: {TOKEN}",
                "Host: 127.0.0.1",
            ):
                assert get(port, path, wrong) == (401, "Unauthorized\n"), wrong


def test_without_a_token_a_browser_is_not_led_here_under_another_name() -> None:
    with served() as port:
        assert get(port, "/metrics", "Host: evil.example")[0] == 403
        assert get(port, "/metrics", "Host: 127.0.0.1.evil.example")[0] == 403
        assert get(port, "/metrics", "Host: [::1]:9101")[0] == 200


@pytest.mark.parametrize(
    "data",
    [
        b"G" * 20_000,
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n",
        b"\x16\x03\x01\x02\x00" + bytes(range(256)) + b"\r\n\r\n",
        b"GET /metrics\r\n\r\n",
        b"\r\n\r\n",
    ],
    ids=["no end", "long line", "many headers", "tls", "http 0.9", "empty"],
)
def test_odd_requests_end_soon_and_show_nothing(data: bytes) -> None:
    with served() as port:
        began = time.monotonic()
        answer = send(port, data)
        assert time.monotonic() - began < 3
        assert b"200 OK" not in answer
        assert get(port, "/metrics")[0] == 200


def test_slow_callers_are_cut_off_and_others_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_http, "REQUEST_SECONDS", 0.5)
    with served() as port, contextlib.ExitStack() as stack:
        slow = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        began = time.monotonic()
        slow.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert get(port, "/metrics")[0] == 200
        # A byte now and then does not buy more time.
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5:
                slow.sendall(b"X")
                time.sleep(0.05)
                slow.setblocking(False)
                try:
                    if slow.recv(1) == b"":
                        break
                except BlockingIOError:
                    slow.setblocking(True)
        assert time.monotonic() - began < 3


def test_callers_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync_http, "MAX_CALLERS", 2)
    with served() as port, contextlib.ExitStack() as stack:
        idle = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            for _ in range(2)
        ]
        deadline = time.monotonic() + 5
        while get(port, "/metrics")[0] == 200:  # until both idle ones have been taken up
            assert time.monotonic() < deadline
        assert get(port, "/metrics")[0] == 0
        for connection in idle:
            connection.close()
        while get(port, "/metrics")[0] != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "text",
    ["0.0.0.0:9101", "[::]:9101", "192.168.1.5:80", "[::ffff:10.0.0.1]:80", "10.0.0.1:0"],
)
def test_binding_wider_needs_a_token(text: str) -> None:
    with pytest.raises(ConfigError, match="give a token"):
        Listen.parse(text, None)
    assert Listen.parse(text, TOKEN).token == TOKEN


@pytest.mark.parametrize(
    "text",
    ["9101", ":9101", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "host.example:1", "a:²"],
)
def test_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--listen"):
        Listen.parse(text, TOKEN)


@pytest.mark.parametrize("text", ["127.0.0.1:0", "localhost:1", "[::1]:2", "127.9.9.9:3"])
def test_loopback_needs_none(text: str) -> None:
    assert Listen.parse(text, None).token is None


def test_a_port_that_is_taken_is_said() -> None:
    with served() as port, pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}"):
        SyncServer(Listen.parse(f"127.0.0.1:{port}", None), Window())


def test_a_token_is_read_and_a_weak_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    assert read_token(file) == TOKEN
    for text in (
        "",
        "short",
        "x" * 15,
        "with a space in the middle",
        "tab\tin-the-middle-of-it",
        "é" * 20,
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="16 to 4096 printable") as caught:
            read_token(file)
        assert not text or text not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot read the token"):
        read_token(tmp_path / "none")


def test_a_token_is_compared_in_constant_time() -> None:
    source = Path(sync_http.__file__).read_text()
    assert len(re.findall(r"hmac\.compare_digest", source)) == 1
    assert not re.findall(r"token\w* ?[!=]= ?", source)
