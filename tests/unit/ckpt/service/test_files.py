"""Downloads: conditions, ranges, verified bytes, and nothing outside a root."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.published import damage, publish_one
from support.serving import serving
from support.steps import tiny_adapter, write_step

from ckpt.service.download import matches, span_of
from ckpt.storage import open_storage

NAME = "run7-v00000001"
FILES = f"/v1/runs/lab/versions/{NAME}/files"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    path = place / "lab"
    tensors, export = tiny_adapter()
    write_step(open_storage(path), 0, tensors, export=export)
    publish_one(path)
    (place / "secret").write_text("not of this root")
    (path / "notes.txt").write_text("not served")
    (path / "adapters" / ".tmp-x").mkdir()
    (path / "adapters" / ".tmp-x" / "half").write_text("unfinished")
    (path / "adapters" / "link").symlink_to(place / "secret")
    return path


@pytest.fixture(scope="module")
def client(root: Path) -> Iterator[httpx.Client]:
    with serving(root) as client:
        yield client


def weights(root: Path) -> bytes:
    return (root / "adapters" / NAME / "adapter_model.safetensors").read_bytes()


def test_the_tag_is_the_sha256(client: httpx.Client, root: Path) -> None:
    for file in ("adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"):
        answer = client.get(f"{FILES}/{file}")
        want = (root / "adapters" / NAME / file).read_bytes()
        assert answer.content == want
        tag = f'"{hashlib.sha256(want).hexdigest()}"'
        assert answer.headers["etag"] == tag
        assert "immutable" in answer.headers["cache-control"]
        again = client.get(f"{FILES}/{file}", headers={"If-None-Match": f'"x", W/{tag}'})
        assert (again.status_code, again.content) == (304, b"")
        head = client.head(f"{FILES}/{file}")
        assert (head.headers["content-length"], head.content) == (str(len(want)), b"")


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-0", 0, 1), ("bytes=5-99", 5, 100), ("bytes=7-", 7, None), ("bytes=-9", -9, None)],
)
def test_a_range(
    client: httpx.Client, root: Path, asked: str, first: int, last: int | None
) -> None:
    answer = client.get(f"{FILES}/adapter_model.safetensors", headers={"Range": asked})
    data = weights(root)
    assert answer.status_code == 206
    assert answer.content == data[first:last]
    start = first % len(data)
    want = f"bytes {start}-{start + len(answer.content) - 1}/{len(data)}"
    assert answer.headers["content-range"] == want


def test_ranges_that_do_not_count(client: httpx.Client, root: Path) -> None:
    url, data = f"{FILES}/adapter_model.safetensors", weights(root)
    for asked in ("bytes=0-1,4-5", "lines=0-1", "bytes=9-3", "bytes=x"):
        assert client.get(url, headers={"Range": asked}).content == data
    beyond = client.get(url, headers={"Range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416
    assert beyond.headers["content-range"] == f"bytes */{len(data)}"
    stale = client.get(url, headers={"Range": "bytes=0-3", "If-Range": '"another"'})
    assert (stale.status_code, stale.content) == (200, data)


def test_spans_and_tags() -> None:
    assert span_of("bytes=-5", 3) == (0, 3)
    with pytest.raises(ValueError, match="bytes"):
        span_of("bytes=-0", 3)
    assert matches("*", '"a"')
    assert not matches('"b"', '"a"')
    assert not matches("*", None)


def test_a_damaged_file_is_never_sent_whole(tmp_path: Path) -> None:
    damage(tmp_path, publish_one(tmp_path))
    with (
        serving(f"lab={tmp_path}") as client,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        client.get(f"{FILES}/adapter_model.safetensors")


def test_a_root_as_it_lies_there(client: httpx.Client, root: Path) -> None:
    entries = client.get("/v1/runs/lab/entries/adapters").json()["entries"]
    assert [e["name"] for e in entries] == ["link", NAME, f"{NAME}.claim.json"]
    path = "steps/step-00000000.w0001/MANIFEST.json"
    assert client.get(f"/v1/runs/lab/files/{path}").content == (root / path).read_bytes()
    assert client.get("/v1/runs/lab/entries/steps/nothing").json() == {"entries": []}


def raw(client: httpx.Client, target: str) -> tuple[int, bytes]:
    """Status and body of a GET whose target no client library tidies up."""
    url = client.base_url
    with socket.create_connection((url.host, url.port), timeout=10) as connection:
        head = f"GET {target} HTTP/1.1\r\nHost: {url.host}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode("latin-1"))
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    return int(data.split(b" ", 2)[1]), data.partition(b"\r\n\r\n")[2]


OUTSIDE = [
    "notes.txt",
    "../secret",
    "..%2fsecret",
    "%2e%2e/secret",
    "adapters/../../secret",
    "adapters/..%2f..%2fsecret",
    "adapters/%2e%2e/%2e%2e/secret",
    "adapters%2f..%2f..%2fsecret",
    "adapters//..//..//secret",
    "adapters/./link",
    "adapters/link",
    "adapters/link%00",
    "adapters\\..\\..\\secret",
    "adapters/..%5c..%5csecret",
    "adapters/.tmp-x/half",
    "%2fetc%2fpasswd",
    "/etc/passwd",
    "file:///etc/passwd",
    "adapters/" + "a" * 3000,
    "adapters/%c0%ae%c0%ae/secret",
    "",
    ".",
    "adapters",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_nothing_outside_a_root_is_read(client: httpx.Client, path: str) -> None:
    for operation in ("files", "entries"):
        status, body = raw(client, f"/v1/runs/lab/{operation}/{path}")
        if operation == "entries" and path == "adapters":
            continue
        assert b"not of this root" not in body
        assert b"unfinished" not in body or b"unfinished work" in body
        assert b"root:" not in body
        allowed = {400, 404, 414, 422, 503} | ({200} if operation == "entries" else set())
        assert status in allowed, (operation, path, status)
        if status == 200:
            assert body == b'{"entries":[]}'


@pytest.mark.parametrize(
    "name", ["..", "..%2f..", "run7-v1", "a" * 200, "%00", "run7-v00000001%2f.."]
)
def test_names_are_names(client: httpx.Client, name: str) -> None:
    for path in (
        f"versions/{name}",
        f"versions/{name}/files/MANIFEST.json",
        f"exports/{name}/files/x",
    ):
        status, body = raw(client, f"/v1/runs/lab/{path}")
        assert status in {404, 409, 422}, (path, body)
    assert raw(client, f"/v1/runs/{name}")[0] in {404, 422}
