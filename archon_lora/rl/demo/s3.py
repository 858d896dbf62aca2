"""An S3 server for the time of the demonstration: moto, in a child, on loopback."""

from __future__ import annotations

import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from archon_lora.rl.demo.processes import Child

BUCKET = "demo"
_START_TIMEOUT_S = 40.0


def client_environment(endpoint: str) -> dict[str, str]:
    """Variables by which S3 clients find the server; moto takes any credentials."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _request(url: str, method: str) -> bool:
    """Whether the server answers the request with success."""
    request = urllib.request.Request(url, method=method)  # noqa: S310 - our own http://127.0.0.1 URL
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310 - as above
            return bool(answer.status < 300)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def embedded_s3(log: Path, env: Mapping[str, str]) -> Iterator[str]:
    """Start the server and make the bucket; ended when the block is left, however that happens.

    Args:
        log: the server's log file.
        env: environment of the server.

    Yields:
        The endpoint's URL.

    Raises:
        ChildFailed: the server did not come up.
    """
    endpoint = f"http://127.0.0.1:{(port := _free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with Child(command, log=log, env=env) as server:
        server.until(lambda: _request(endpoint, "GET"), _START_TIMEOUT_S, "answer of the S3 server")
        server.until(
            lambda: _request(f"{endpoint}/{BUCKET}", "PUT"), _START_TIMEOUT_S, "bucket made"
        )
        yield endpoint
