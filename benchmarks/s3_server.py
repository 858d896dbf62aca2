"""A moto server on loopback whose log counts the requests."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import s3fs

BUCKET = "bench"
KEY = "benchmark-access"
SECRET = "benchmark-secret"
START_SECONDS = 60
_REQUEST = re.compile(rb'"(?:GET|PUT|POST|HEAD|DELETE) ')


@dataclass(frozen=True)
class S3Server:
    """Where the server listens, and its log."""

    endpoint_url: str
    log: Path = field(repr=False)
    name: str = "moto on loopback"
    bucket_url: str = f"s3://{BUCKET}"

    @property
    def storage_options(self) -> dict[str, str]:
        """What fsspec takes."""
        return {"endpoint_url": self.endpoint_url, "key": KEY, "secret": SECRET}

    def requests(self) -> int:
        """Requests answered so far, by the server's log."""
        return len(_REQUEST.findall(self.log.read_bytes()))

    def export_environment(self) -> None:
        """Point clients that read the environment to the server."""
        os.environ |= {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@dataclass(frozen=True)
class GivenServer(S3Server):
    """The server that the AWS variables name."""

    @property
    def storage_options(self) -> dict[str, str]:
        """Nothing: everything comes from the environment."""
        return {}


@contextlib.contextmanager
def server_for(folder: Path) -> Iterator[S3Server]:
    """The server of ``AWS_ENDPOINT_URL`` and a bucket of ``CKPT_TEST_BUCKET``, else moto."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    if endpoint is None:
        with running_server(folder) as server:
            yield server
        return
    bucket = os.environ.get("CKPT_TEST_BUCKET", BUCKET)
    with contextlib.suppress(FileExistsError):
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    yield GivenServer(endpoint, folder / "none", endpoint, f"s3://{bucket}")


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[S3Server]:
    """A server with an empty bucket; it ends with the block.

    Raises:
        RuntimeError: it does not start; carries its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server = S3Server(f"http://127.0.0.1:{port}", folder / "moto.log")
    with server.log.open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "moto.server",
                "-H",
                "127.0.0.1",
                "-p",
                f"{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
    try:
        _wait_until_ready(process, port, server.log)
        server.export_environment()
        s3fs.S3FileSystem(**server.storage_options, skip_instance_cache=True).mkdir(BUCKET)
        yield server
    finally:
        process.kill()
        process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    text = log.read_text(errors="replace")[-2000:]
    msg = f"the S3 server did not start on port {port}: {text}"
    raise RuntimeError(msg)
