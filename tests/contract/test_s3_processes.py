"""S3 connections and processes: after a fork, in a spawned child, and at the end of one."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.s3_server import S3Server

import ckpt
from ckpt.storage import open_storage
from ckpt.storage.base import Storage

pytestmark = [
    pytest.mark.s3,
    # multiprocessing warns about fork in a process with threads, which is what is tested
    pytest.mark.filterwarnings("ignore:.*fork.*may lead to deadlocks:DeprecationWarning"),
]


def read_and_write(store: Storage, name: str) -> None:
    assert store.read("x") == b"parent"
    store.put(name, b"child")
    store.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_opens_connections_of_its_own(s3: S3Server, method: str) -> None:
    store = open_storage(s3.url(), s3.storage_options)
    store.put("x", b"parent")
    child = multiprocessing.get_context(method).Process(target=read_and_write, args=(store, method))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == 0
    assert store.read(method) == b"child"
    store.close()


@pytest.mark.parametrize(
    "end", ["", "store.close()", "del store", "store.close(); store.read('x')"]
)
def test_a_process_ends_without_unclosed_sockets(s3: S3Server, end: str) -> None:
    """The store is found through the environment alone; the interpreter reports what is left."""
    code = f"""
from ckpt.storage import open_storage
store = open_storage({s3.url()!r})
store.put("x", b"1")
assert store.read("x") == b"1"
{end}
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-W", "always::ResourceWarning", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(ckpt.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_failed_upload_leaves_no_parts_on_the_server(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 2**20)
    url = s3.url("uploads")
    store = open_storage(url, s3.storage_options)
    data = os.urandom(33 * 2**20)

    def chunks():
        yield data[: 20 * 2**20]
        yield data[20 * 2**20 :]

    store.put_stream("big", chunks(), len(data))
    assert store.read("big", 0, len(data)) == data

    def broken():
        yield data[: 20 * 2**20]
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.put_stream("broken", broken(), len(data))
    assert not store.exists("broken")
    store.close()
    client = s3.client()
    prefix = url.rpartition("/")[2]
    assert not client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix).get("Uploads")
    client.close()
