"""An S3 server for tests: moto on loopback, or the one the AWS variables name."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from ckpt.errors import ConfigError
from ckpt.storage import open_storage

START_SECONDS = 60
BUCKET_VARIABLE = "CKPT_TEST_BUCKET"


def named_server() -> str | None:
    """The address of the server that the environment names for the tests, if it does."""
    return os.environ.get("AWS_ENDPOINT_URL")


@dataclass(frozen=True)
class S3Server:
    """Where a server listens and how to talk to it.

    Attributes:
        endpoint_url: its address.
        bucket: a bucket that this test alone uses.
        environment: variables that point any AWS client, also in a child process, to it.
        storage_options: what ``open_storage`` takes.
    """

    endpoint_url: str
    bucket: str
    environment: dict[str, str] = field(repr=False)
    prefixes: list[str] = field(default_factory=list, repr=False)

    @property
    def storage_options(self) -> dict[str, str]:
        return {
            "endpoint_url": self.endpoint_url,
            "key": self.environment["AWS_ACCESS_KEY_ID"],
            "secret": self.environment["AWS_SECRET_ACCESS_KEY"],
        }

    def options_for(self, backend: str) -> dict[str, object]:
        """Storage options for a backend; skips the test where that one refuses the certificate.

        A server's certificate that is an authority's own is common on test servers.
        """
        options = {**self.storage_options, "backend": backend}
        if backend == "obstore" and self.endpoint_url.startswith("https:"):
            with contextlib.closing(open_storage(self.url("tls"), options)) as store:
                try:
                    store.put("x", b"")
                except ConfigError as error:
                    pytest.skip(str(error))
        return options

    def url(self, prefix: str = "run") -> str:
        """A prefix that nobody else uses."""
        unique = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.prefixes.append(unique)
        return f"s3://{self.bucket}/{unique}"

    def client(self):
        """A boto3 client: a second opinion on what lies in the bucket. Close it after use."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.environment["AWS_SECRET_ACCESS_KEY"],
            region_name=self.environment["AWS_DEFAULT_REGION"],
            config=Config(request_checksum_calculation="when_required"),
        )

    def for_a_test(self) -> S3Server:
        """This server with the bucket that ``CKPT_TEST_BUCKET`` names, or else a new one."""
        named = os.environ.get(BUCKET_VARIABLE)
        return replace(self, bucket=named, prefixes=[]) if named else self.with_new_bucket()

    def clean(self) -> None:
        """Delete what tests left under the prefixes that were asked for, uploads included."""
        with contextlib.closing(self.client()) as client:
            for prefix in self.prefixes:
                pages = client.get_paginator("list_objects_v2")
                for page in pages.paginate(Bucket=self.bucket, Prefix=prefix):
                    for item in page.get("Contents", ()):
                        client.delete_object(Bucket=self.bucket, Key=item["Key"])
                found = client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix)
                for upload in found.get("Uploads", ()):
                    client.abort_multipart_upload(
                        Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
            if self.bucket != os.environ.get(BUCKET_VARIABLE):
                with contextlib.suppress(ClientError):  # a test wrote elsewhere in it
                    client.delete_bucket(Bucket=self.bucket)

    def with_new_bucket(self) -> S3Server:
        """This server with a bucket of a test's own."""
        bucket = f"ckpt-{uuid.uuid4().hex[:20]}"
        with contextlib.closing(self.client()) as client:
            client.create_bucket(Bucket=bucket)
        return replace(self, bucket=bucket, prefixes=[])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment_of(endpoint_url: str, key: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint_url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
        # A machine's own settings and proxies must not lead the tests elsewhere.
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@contextlib.contextmanager
def running_server() -> Iterator[S3Server]:
    """The server of the environment, or a moto server that ends with the block."""
    named = named_server()
    if named:
        key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        yield S3Server(named, "", environment_of(named, key, secret))
        return
    port = free_port()
    server = S3Server(
        f"http://127.0.0.1:{port}",
        "",
        environment_of(f"http://127.0.0.1:{port}", "access-key-of-tests", "secret-key-of-tests"),
    )
    with tempfile.TemporaryFile() as log:
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
                str(port),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            _wait_until_ready(process, port, log)
            yield server
        finally:
            process.kill()
            process.wait(timeout=30)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    log.seek(0)
    text = log.read().decode(errors="replace")[-2000:]
    raise RuntimeError(f"the S3 server did not start on port {port}: {text}")
