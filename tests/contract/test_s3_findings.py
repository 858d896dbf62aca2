"""What real S3 servers were seen to do, against whichever server the tests run on.

The server's own behaviour is established with boto3 first; then the store must either keep its
promise there, or refuse it with a remedy. Answers that only some servers give are put in by a
proxy.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import pytest
from botocore.exceptions import ClientError
from support.fake_s3 import Spoil
from support.fault_proxy import FaultProxy, fault_proxy
from support.s3_server import S3Server

from ckpt.checksum import file_record
from ckpt.errors import AlreadyExists, CommitUnknown, DamagedError, StorageError, StoreNotExclusive
from ckpt.storage import Storage, open_storage, read_checked

pytestmark = pytest.mark.s3

RETRY = {"attempts": 3, "base": 0.01, "cap": 0.05, "seconds": 20.0}
BACKENDS = ["s3fs", "obstore"]


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(s3.endpoint_url) as between:
        yield between


@pytest.fixture(params=BACKENDS)
def store(request: pytest.FixtureRequest, s3: S3Server, proxy: FaultProxy) -> Iterator[Storage]:
    """A store that reaches the server through the proxy."""
    options = {**s3.storage_options, "endpoint_url": proxy.url, "retry": RETRY}
    storage = open_storage(s3.url("findings"), {**options, "backend": request.param})
    yield storage
    storage.close()


def status_of(error: ClientError) -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def keeps_condition_on_put(s3: S3Server) -> bool:
    """Whether a second conditional PUT is refused, and not only as best effort (Swift)."""
    name = s3.url("condition").rpartition("/")[2]
    with contextlib.closing(s3.client()) as client:
        put = {"Bucket": s3.bucket, "Key": name, "IfNoneMatch": "*"}
        headers = client.put_object(Body=b"1", **put)["ResponseMetadata"]["HTTPHeaders"]
        try:
            client.put_object(Body=b"2", **put)
        except ClientError as error:
            return status_of(error) == 412 and "x-openstack-request-id" not in headers
    return False


def keeps_condition_on_multipart(s3: S3Server) -> bool:
    """Whether the conditional completion of an upload leaves an existing object alone."""
    place = {"Bucket": s3.bucket, "Key": s3.url("condition").rpartition("/")[2]}
    with contextlib.closing(s3.client()) as client:
        client.put_object(Body=b"1", **place)
        upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
        part = client.upload_part(PartNumber=1, Body=b"2", **upload)
        parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
        try:
            client.complete_multipart_upload(MultipartUpload=parts, IfNoneMatch="*", **upload)
        except ClientError:
            client.abort_multipart_upload(**upload)
        return client.get_object(**place)["Body"].read() == b"1"


def test_a_server_is_refused_exactly_if_it_cannot_fence(s3: S3Server) -> None:
    """Nothing is lost in silence: creates are exclusive, or there are none and it says so."""
    store = open_storage(s3.url("fence"), s3.storage_options)
    if keeps_condition_on_put(s3):
        store.put_new("x", b"first")
        with pytest.raises(AlreadyExists):
            store.put_new("x", b"second")
    else:
        store.put("x", b"first")
        with pytest.raises(StoreNotExclusive, match="use a store with conditional writes"):
            store.put_new("x", b"second")
    assert store.read("x") == b"first"
    store.close()


def test_large_creates_are_refused_exactly_if_they_would_overwrite(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 100)
    store = open_storage(s3.url("fence"), s3.storage_options)
    if keeps_condition_on_put(s3) and keeps_condition_on_multipart(s3):
        store.put_new("x", b"first" * 50)
        with pytest.raises(AlreadyExists):
            store.put_new("x", b"other" * 50)
        assert store.read("x") == b"first" * 50
    else:
        store.put("x", b"first" * 10)
        with pytest.raises(StoreNotExclusive, match="use a store with conditional writes"):
            store.put_new("x", b"other" * 50)
        assert store.read("x") == b"first" * 10
    assert [entry.name for entry in store.list("")] == ["x"]
    store.close()


def test_uploads_have_a_length_and_no_trailer(proxy: FaultProxy, store: Storage) -> None:
    """Older Ceph answers 411 to a body in chunks, botocore's default over TLS."""
    store.put("x", b"data")
    for head in proxy.requests("PUT"):
        assert head["content-length"] == "4"
        assert "x-amz-trailer" not in head
        assert "transfer-encoding" not in head
        assert head["x-amz-content-sha256"] != "STREAMING-UNSIGNED-PAYLOAD-TRAILER"


@pytest.mark.parametrize("how", ["drop-after", "status-after"])
def test_a_create_whose_answer_is_lost_is_ours(proxy: FaultProxy, store: Storage, how: str) -> None:
    """The repeated request is refused by the object that the first one made."""
    store.put_new("warm-up", b"")
    proxy.spoils = [Spoil("PUT", how, key="/x")]
    store.put_new("x", b"mine")
    with pytest.raises(AlreadyExists):
        store.put_new("x", b"yours")
    assert store.read("x") == b"mine"


def test_a_create_that_nobody_answers_is_unknown(proxy: FaultProxy, store: Storage) -> None:
    store.put_new("warm-up", b"")
    proxy.spoils = [
        Spoil("PUT", "drop-after", key="/x"),
        Spoil("PUT", "drop", key="/x", times=99),
        Spoil("GET", "drop", key="/x", times=99),
    ]
    with pytest.raises(CommitUnknown, match="cannot be read back"):
        store.put_new("x", b"mine")
    proxy.spoils = []
    assert store.read("x") == b"mine"  # and the next reader settles it


@pytest.mark.parametrize("code", ["PreconditionFailed", "", "412"])
def test_a_refusal_needs_no_particular_body(proxy: FaultProxy, store: Storage, code: str) -> None:
    """Ceph and Swift leave out the element by which s3fs knows a 412 as "exists already"."""
    store.put_new("x", b"first")
    proxy.spoils = [Spoil("PUT", "status", (412, code), key="/x")]
    with pytest.raises(AlreadyExists):
        store.put_new("x", b"second")


def test_a_conflict_is_tried_again(proxy: FaultProxy, store: Storage) -> None:
    """Only AWS answers so, when two conditional requests meet."""
    store.put_new("warm-up", b"")
    proxy.spoils = [Spoil("PUT", "status", (409, "ConditionalRequestConflict"), key="/x", times=2)]
    store.put_new("x", b"mine")
    assert store.read("x") == b"mine"


def test_a_flipped_bit_in_a_range_is_noticed(proxy: FaultProxy, store: Storage) -> None:
    """The client checks whole objects at most; a range has no checksum but ours."""
    data = os.urandom(100_000)
    store.put("x", data)
    record = file_record("x", [data])
    proxy.spoils = [Spoil("GET", "flip", key="/x", times=1)]
    assert read_checked(store, "x", record, 10, 20_000) == data[10:20_000]
    proxy.spoils = [Spoil("GET", "flip", key="/x", times=99)]
    assert store.read("x", 10, 20_000) != data[10:20_000]
    with pytest.raises((DamagedError, StorageError), match=r"are damaged|did not match"):
        read_checked(store, "x", record, 10, 20_000)


@pytest.mark.parametrize("how", ["truncate", "drop"])
def test_a_broken_answer_is_asked_for_again(proxy: FaultProxy, store: Storage, how: str) -> None:
    """The errors of a cut body are no OSErrors; they must not pass by those who handle ours."""
    data = os.urandom(100_000)
    store.put("x", data)
    proxy.spoils = [Spoil("GET", how, key="/x", times=2)]
    assert store.read("x", 5, 90_000) == data[5:90_000]


@pytest.mark.parametrize("code", [(503, "SlowDown"), (500, "InternalError"), (429, "Throttling")])
def test_bursts_of_a_busy_server_pass(
    proxy: FaultProxy, store: Storage, code: tuple[int, str]
) -> None:
    proxy.spoils = [Spoil(method, "status", code, times=2) for method in ("PUT", "GET", "HEAD")]
    store.put("x", b"data")
    assert store.read("x") == b"data"
    assert store.size("x") == 4
