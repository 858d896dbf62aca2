"""Hundreds of long polls on one service: all are answered, and memory stays bounded."""

from __future__ import annotations

import json
import os
import resource
import selectors
import socket
import time
from pathlib import Path

import httpx
import pytest
from support.published import publish_one
from support.services import Killable, killable

COUNT = 500 if os.environ.get("CKPT_SERVICE") == "full" else 200
EACH = 64 * 1024
"""Bytes of the service's memory that one who waits may cost."""


def waiting(service: Killable, request: bytes, count: int) -> list[socket.socket]:
    """Connections that wait for an answer."""
    opened = []
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", service.port), timeout=20)
        one.sendall(request)
        opened.append(one)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = httpx.get(f"{service.url}/metrics").text
        if f'ckpt_waiting{{root="lab"}} {count}.0' in text:
            return opened
        time.sleep(0.05)
    raise AssertionError(text)


def answers(opened: list[socket.socket], within_s: float, needle: bytes) -> list[float]:
    """When each connection had got what holds ``needle``, in seconds since the call."""
    begun, seen = time.monotonic(), dict.fromkeys(opened, b"")
    took: list[float] = []
    with selectors.DefaultSelector() as selector:
        for one in opened:
            selector.register(one, selectors.EVENT_READ)
        while seen and time.monotonic() - begun < within_s:
            for key, _events in selector.select(0.2):
                one = key.fileobj
                assert isinstance(one, socket.socket)
                data = one.recv(65536)
                assert data, "the service closed a connection without an answer"
                seen[one] += data
                if needle in seen[one]:
                    took.append(time.monotonic() - begun)
                    selector.unregister(one)
                    del seen[one]
    assert not seen, f"{len(seen)} of {len(opened)} got no answer"
    return took


@pytest.mark.slow
@pytest.mark.parametrize("path", ["wait?newer_than=1&timeout_s=60", "events?newer_than=1"])
def test_many_wait_at_a_bounded_cost(path: str, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    publish_one(tmp_path / "lab")
    request = f"GET /v1/runs/lab/{path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with killable(tmp_path / "lab") as service:
        for opened in (waiting(service, request, 20),):  # imports and pools come first
            for one in opened:
                one.close()
        time.sleep(0.3)
        before = service.memory()
        opened = waiting(service, request, COUNT)
        cost = service.memory() - before
        try:
            assert cost < EACH * COUNT, f"{cost / COUNT / 1024:.0f} KiB for each that waits"
            name = publish_one(tmp_path / "lab", seed=1)
            answers(opened, 20, f'"name":"{name}"'.encode())
            newest = httpx.get(f"{service.url}/v1/runs/lab/latest").json()
            assert newest["summary"]["name"] == name
            assert json.dumps(newest)
        finally:
            for one in opened:
                one.close()
