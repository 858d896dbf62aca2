"""S3 when things go wrong: every outcome is either success, or an error that says the truth."""

from __future__ import annotations

import hashlib
import pickle
import socket
import time
import traceback
import zlib
from base64 import b64encode
from collections.abc import Iterator

import pytest
from support.certificates import certificate
from support.fake_s3 import FakeS3, Spoil, fake_s3

from ckpt.errors import (
    AlreadyExists,
    CommitUnknown,
    ConfigError,
    ObjectNotFound,
    StorageError,
    StoreNotExclusive,
)
from ckpt.storage import Traffic, open_storage
from ckpt.storage.retry import RetryPolicy
from ckpt.storage.s3 import S3Storage
from ckpt.storage.s3_obstore import ObstoreStorage

QUICK = RetryPolicy(attempts=3, base=0.01, cap=0.02, seconds=5.0)
SECRET = "wJalrXUtnFEMI-very-secret"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with fake_s3() as server:
        yield server


def options(fake: FakeS3, **more: object) -> dict[str, object]:
    return {"endpoint_url": fake.url, "key": "access-key-id", "secret": SECRET, **more}


@pytest.fixture(params=[S3Storage, ObstoreStorage])
def store(request: pytest.FixtureRequest, fake: FakeS3) -> Iterator[S3Storage]:
    storage = request.param("s3://bucket/run", options(fake), QUICK)
    yield storage
    storage.close()


@pytest.mark.parametrize("code", [(503, "SlowDown"), (500, "InternalError"), (429, "Throttling")])
def test_a_busy_server_is_asked_again(fake: FakeS3, store: S3Storage, code) -> None:
    fake.spoils = [Spoil("PUT", "status", code, times=2), Spoil("GET", "status", code, times=2)]
    store.put("x", b"data")
    assert store.read("x") == b"data"
    assert len(fake.requests("PUT")) == len(fake.requests("GET")) == 3


def test_repeated_requests_are_counted(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "status", (503, "SlowDown"), times=2)]
    store.put("x", b"data")
    assert store.traffic == Traffic(requests=3, sent=12, received=0)


@pytest.mark.parametrize("how", ["drop", "drop-after"])
def test_a_lost_connection_is_made_again(fake: FakeS3, store: S3Storage, how: str) -> None:
    fake.spoils = [Spoil(method, how) for method in ("PUT", "GET", "HEAD", "DELETE")]
    store.put("x", b"data")
    assert store.read("x") == b"data"
    assert store.size("x") == 4
    store.delete("x")
    assert not fake.objects


def test_the_number_of_tries_is_bounded_and_there_is_one_layer(
    fake: FakeS3, store: S3Storage
) -> None:
    fake.spoils = [Spoil("PUT", "status", times=99)]
    with pytest.raises(StorageError, match="run/x: write failed: HTTP 500 InternalError: spoilt"):
        store.put("x", b"data")
    assert len(fake.requests("PUT")) == QUICK.attempts


@pytest.mark.parametrize("code", [(403, "AccessDenied"), (400, "InvalidArgument")])
def test_a_final_answer_is_not_questioned(fake: FakeS3, store: S3Storage, code) -> None:
    fake.spoils = [Spoil("PUT", "status", code, times=99)]
    with pytest.raises(StorageError, match=f"HTTP {code[0]} {code[1]}"):
        store.put("x", b"data")
    assert len(fake.requests("PUT")) == 1


@pytest.mark.parametrize("kind", [S3Storage, ObstoreStorage])
def test_a_server_that_hangs_does_not_hang_us(fake: FakeS3, kind: type[S3Storage]) -> None:
    retry = {"attempts": 2, "base": 0.01, "seconds": 0.3, "bytes_per_second": 1e9}
    store = pickle.loads(pickle.dumps(kind("s3://bucket/run", options(fake, retry=retry))))
    fake.spoils = [Spoil("PUT", "hang", times=9, seconds=15.0)]
    began = time.monotonic()
    with pytest.raises(StorageError, match="x: write failed: no answer in time"):
        store.put("x", b"data")
    assert time.monotonic() - began < 10.0
    store.close()


@pytest.mark.parametrize("span", [(0, None), (2, 8)])
def test_a_truncated_answer_is_asked_for_again(fake: FakeS3, store: S3Storage, span) -> None:
    fake.objects["run/x"] = b"0123456789"
    fake.spoils = [Spoil("GET", "truncate", times=2)]
    assert store.read("x", *span) == b"0123456789"[slice(*span)]


def test_truncation_without_end_is_an_error(fake: FakeS3, store: S3Storage) -> None:
    fake.objects["run/x"] = b"0123456789"
    fake.spoils = [Spoil("GET", "truncate", times=99)]
    with pytest.raises(StorageError, match="x: read failed"):
        store.read("x")


def test_bytes_damaged_on_the_way_are_sent_again(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "status", (400, "BadDigest"))]
    store.put("x", b"data")
    assert fake.objects["run/x"] == b"data"


def test_a_missing_bucket_is_not_an_empty_one(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("GET", "status", (404, "NoSuchBucket"), times=99)]
    with pytest.raises(StorageError, match="NoSuchBucket") as caught:
        store.list("steps")
    assert not isinstance(caught.value, ObjectNotFound)


# Exclusive create


def created(fake: FakeS3) -> dict[str, bytes]:
    """What lies there beside probes; no probe may be left over."""
    assert not [key for key in fake.objects if "probe" in key]
    return fake.objects


def test_a_refusal_is_told_by_its_status(fake: FakeS3, store: S3Storage) -> None:
    """Servers other than AWS leave out the detail by which s3fs would know."""
    store.put_new("x", b"mine")
    with pytest.raises(AlreadyExists, match="run/x exists already"):
        store.put_new("x", b"yours")
    assert created(fake) == {"run/x": b"mine"}


@pytest.mark.parametrize("how", ["drop-after", "status-after"])
def test_a_lost_yes_is_still_a_yes(fake: FakeS3, store: S3Storage, how: str) -> None:
    fake.spoils = [Spoil("PUT", how, key="run/x")]
    store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"mine"}


@pytest.mark.parametrize("how", ["drop", "status", "drop-after", "status-after"])
def test_a_lost_no_is_still_a_no(fake: FakeS3, store: S3Storage, how: str) -> None:
    def other() -> None:
        fake.objects["run/x"] = b"other"

    fake.spoils = [Spoil("PUT", how, key="run/x", before=other)]
    with pytest.raises(AlreadyExists, match="written by somebody else"):
        store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"other"}


def test_a_yes_lost_at_the_last_try_is_settled(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [
        Spoil("PUT", "status", key="run/x", times=2),
        Spoil("PUT", "drop-after", key="run/x"),
    ]
    store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"mine"}


def test_nothing_but_lost_answers_is_unknown(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "drop", key="run/x", times=99)]
    with pytest.raises(CommitUnknown, match=r"run/x: the answer .* lost .* may still appear"):
        store.put_new("x", b"mine")
    tries = [key for method, key, *_ in fake.log if (method, key) == ("PUT", "run/x")]
    # The HTTP client repeats a PUT once where the server closed the connection under it.
    assert QUICK.attempts <= len(tries) <= 2 * QUICK.attempts


def test_a_lost_answer_that_cannot_be_read_back_is_unknown(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [
        Spoil("PUT", "drop-after", key="run/x"),
        Spoil("GET", "status", key="run/x", times=99),
    ]
    with pytest.raises(CommitUnknown, match=r"cannot be read back.*HTTP 500"):
        store.put_new("x", b"mine")


def test_a_failure_that_is_certain_is_not_unknown(fake: FakeS3, store: S3Storage) -> None:
    store.put_new("first", b"")
    fake.spoils = [Spoil("PUT", "status", (403, "AccessDenied"), key="run/x")]
    with pytest.raises(StorageError, match="HTTP 403 AccessDenied"):
        store.put_new("x", b"mine")


def test_no_connection_is_not_unknown(fake: FakeS3) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound but not listening: refused
        port = closed.getsockname()[1]
        store = S3Storage(
            "s3://bucket/run", options(fake, endpoint_url=f"http://127.0.0.1:{port}"), QUICK
        )
        store._proven = {"PUT"}  # the probe would fail first
        with pytest.raises(StorageError, match="create failed"):
            store.put_new("x", b"mine")
        store.close()


def test_a_conflict_of_two_writers_is_tried_again(fake: FakeS3, store: S3Storage) -> None:
    conflict = (409, "ConditionalRequestConflict")
    fake.spoils = [Spoil("PUT", "status", conflict, key="run/x", times=2)]
    store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"mine"}


def test_a_conflict_that_the_other_one_wins(fake: FakeS3, store: S3Storage) -> None:
    def other() -> None:
        fake.objects["run/x"] = b"other"

    conflict = (409, "ConditionalRequestConflict")
    fake.spoils = [Spoil("PUT", "status", conflict, key="run/x", before=other)]
    with pytest.raises(AlreadyExists):
        store.put_new("x", b"mine")


def test_a_refusal_for_what_vanished_is_still_a_refusal(fake: FakeS3, store: S3Storage) -> None:
    store.put_new("first", b"")
    fake.spoils = [Spoil("PUT", "status", (412, "PreconditionFailed"), key="run/x")]
    with pytest.raises(AlreadyExists, match="deleted meanwhile"):
        store.put_new("x", b"mine")


def test_a_store_that_ignores_the_condition_is_refused(fake: FakeS3, store: S3Storage) -> None:
    fake.conditions = False
    fake.objects["run/x"] = b"other"
    with pytest.raises(StoreNotExclusive, match=r"ignores 'If-None-Match'.*use a store with"):
        store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"other"}


def test_a_store_that_lacks_the_condition_is_refused(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "status", (501, "NotImplemented"), times=99)]
    with pytest.raises(StoreNotExclusive, match="does not know 'If-None-Match'"):
        store.put_new("x", b"mine")
    assert created(fake) == {}


@pytest.mark.parametrize("header", ["X-Trans-Id", "x-openstack-request-id"])
def test_a_store_known_for_best_effort_is_refused(
    fake: FakeS3, store: S3Storage, header: str
) -> None:
    fake.headers = {header: "tx1"}
    with pytest.raises(StoreNotExclusive, match="only as best effort"):
        store.put_new("x", b"mine")
    assert created(fake) == {}


def test_the_proof_of_exclusion_is_asked_for_once(fake: FakeS3, store: S3Storage) -> None:
    store.put_new("a", b"1")
    before = len(fake.log)
    store.put_new("b", b"1")
    assert len(fake.log) == before + 1


def test_a_lost_answer_to_the_probe_does_no_harm(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "drop-after", key="probe")]
    store.put_new("x", b"mine")
    assert created(fake) == {"run/x": b"mine"}


# Exclusive creates that are too large for one request


@pytest.fixture
def small_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 100)
    monkeypatch.setattr("ckpt.storage.s3_upload.PART_BYTES", 64)


LARGE = b"mine " * 50
OTHER = b"other " * 50


@pytest.mark.usefixtures("small_puts")
def test_a_large_create_is_exclusive(fake: FakeS3, store: S3Storage) -> None:
    store.put_new("x", LARGE)
    with pytest.raises(AlreadyExists, match="written by somebody else"):
        store.put_new("x", OTHER)
    store.put_new("x", LARGE)  # as after a crash: these are our own bytes
    assert created(fake) == {"run/x": LARGE}
    assert not fake.uploads


@pytest.mark.usefixtures("small_puts")
def test_a_store_that_ignores_the_condition_on_multipart_is_found_out(
    fake: FakeS3, store: S3Storage
) -> None:
    """Seen: the condition kept on a PUT, and silently ignored on a multipart upload."""
    fake.multipart_conditions = False
    fake.objects["run/x"] = OTHER
    with pytest.raises(StoreNotExclusive, match=r"more than 100 bytes.*ignores 'If-None-Match' on"):
        store.put_new("x", LARGE)
    assert created(fake) == {"run/x": OTHER}
    assert not fake.uploads
    store.put_new("small", b"mine")  # which is one PUT, and fenced
    with pytest.raises(AlreadyExists):
        store.put_new("small", b"yours")


@pytest.mark.usefixtures("small_puts")
def test_a_store_that_lacks_the_condition_on_multipart_is_refused(
    fake: FakeS3, store: S3Storage
) -> None:
    fake.spoils = [Spoil("POST", "status", (501, "NotImplemented"), query="uploadId=", times=99)]
    with pytest.raises(StoreNotExclusive, match="does not know 'If-None-Match' on multipart"):
        store.put_new("x", LARGE)
    assert created(fake) == {}
    assert not fake.uploads


@pytest.mark.usefixtures("small_puts")
@pytest.mark.parametrize("how", ["drop-after", "status-after", "drop", "status"])
def test_a_lost_answer_to_a_large_create_is_settled(
    fake: FakeS3, store: S3Storage, how: str
) -> None:
    fake.spoils = [Spoil("POST", how, key="run/x", query="uploadId=")]
    store.put_new("x", LARGE)
    assert created(fake) == {"run/x": LARGE}
    assert not fake.uploads


@pytest.mark.usefixtures("small_puts")
@pytest.mark.parametrize("how", ["drop", "status"])
def test_a_large_create_that_is_never_answered_is_unknown(
    fake: FakeS3, store: S3Storage, how: str
) -> None:
    fake.spoils = [Spoil("POST", how, key="run/x", query="uploadId=", times=99)]
    with pytest.raises(CommitUnknown, match="may still appear"):
        store.put_new("x", LARGE)
    assert not fake.uploads


@pytest.mark.usefixtures("small_puts")
def test_a_conflict_of_a_large_create_uploads_anew(fake: FakeS3, store: S3Storage) -> None:
    conflict = (409, "ConditionalRequestConflict")
    fake.spoils = [Spoil("POST", "status", conflict, key="run/x", query="uploadId=", times=2)]
    store.put_new("x", LARGE)
    assert created(fake) == {"run/x": LARGE}
    assert not fake.uploads
    begun = [q for m, key, q, _ in fake.log if (m, key, q) == ("POST", "run/x", "uploads")]
    assert len(begun) == 3


@pytest.mark.usefixtures("small_puts")
def test_a_large_create_that_fails_for_certain(fake: FakeS3, store: S3Storage) -> None:
    for query in ("partNumber", "uploadId="):
        method = "PUT" if query == "partNumber" else "POST"
        fake.spoils = [
            Spoil(method, "status", (403, "AccessDenied"), key="run/x", query=query, times=99)
        ]
        with pytest.raises(StorageError, match="HTTP 403 AccessDenied"):
            store.put_new("x", LARGE)
        assert created(fake) == {}
        assert not fake.uploads


def test_an_adapter_is_one_request(fake: FakeS3, store: S3Storage) -> None:
    """81 MB: bfloat16 LoRA of rank 16 on every linear layer of a model with 7 billion weights."""
    size = 81_000_000
    store.put_stream("adapter", (bytes(9_000_000) for _ in range(9)), size)
    assert store.traffic == Traffic(requests=1, sent=size, received=0)
    assert len(fake.objects["run/adapter"]) == size


# Multipart uploads


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 100)
    monkeypatch.setattr("ckpt.storage.s3_upload.PART_BYTES", 64)


DATA = bytes(range(256)) * 5 + b"tail"
BUFFERS = [DATA[:1], DATA[1:64], DATA[64:300], DATA[300:301], DATA[301:]]


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("stream", [False, True])
def test_parts_make_the_whole(fake: FakeS3, store: S3Storage, stream: bool) -> None:
    fake.spoils = [Spoil("PUT", "status", (503, "SlowDown"), times=2, skip=3)]
    if stream:
        store.put_stream("x", iter(BUFFERS), len(DATA))
    else:
        store.put("x", BUFFERS)
    assert fake.objects == {"run/x": DATA}
    assert not fake.uploads
    assert len(fake.requests("PUT", "partNumber")) == -(-len(DATA) // 64) + 2


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("skip", [0, 5, 20])
def test_a_failed_part_aborts_and_shows_nothing(fake: FakeS3, store: S3Storage, skip: int) -> None:
    fake.objects["run/x"] = b"old"
    fake.spoils = [Spoil("PUT", "status", (403, "AccessDenied"), times=1, skip=skip)]
    with pytest.raises(StorageError, match="HTTP 403"):
        store.put("x", DATA)
    assert fake.objects == {"run/x": b"old"}
    assert not fake.uploads


@pytest.mark.usefixtures("small_parts")
def test_a_failing_stream_aborts(fake: FakeS3, store: S3Storage) -> None:
    def chunks() -> Iterator[bytes]:
        yield DATA
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        store.put_stream("x", chunks(), 2 * len(DATA))
    with pytest.raises(StorageError, match="nothing was written"):
        store.put_stream("x", [DATA], len(DATA) + 1)
    assert not fake.objects
    assert not fake.uploads


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("how", ["drop-after", "status-after", "drop", "status"])
def test_a_lost_answer_to_complete_is_settled(fake: FakeS3, store: S3Storage, how: str) -> None:
    fake.spoils = [Spoil("POST", how, query="uploadId=")]
    store.put("x", DATA)
    assert fake.objects == {"run/x": DATA}
    assert not fake.uploads


@pytest.mark.usefixtures("small_parts")
def test_an_old_object_is_not_taken_for_a_completed_one(fake: FakeS3, store: S3Storage) -> None:
    fake.objects["run/x"] = bytes(len(DATA))
    fake.spoils = [Spoil("POST", "status", (404, "NoSuchUpload"), query="uploadId=")]
    with pytest.raises(StorageError, match="NoSuchUpload"):
        store.put("x", DATA)


@pytest.mark.usefixtures("small_parts")
def test_a_failed_abort_does_not_hide_the_first_error(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [
        Spoil("PUT", "status", (403, "AccessDenied"), times=99),
        Spoil("DELETE", "status", times=99),
    ]
    # obstore reports the abort's error itself; its first one is lost, but none is.
    first = "HTTP 500" if isinstance(store, ObstoreStorage) else "HTTP 403 AccessDenied"
    with pytest.raises(StorageError, match=first):
        store.put("x", DATA)
    assert not fake.objects


@pytest.mark.usefixtures("small_parts")
def test_a_multipart_that_is_not_there_is_no_success(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("POST", "lie", query="uploadId=", times=99)]
    with pytest.raises(StorageError, match="said that the upload is complete, but"):
        store.put("x", DATA)
    fake.spoils = []
    store.put("x", DATA)
    assert store.read("x") == DATA


@pytest.mark.usefixtures("small_parts")
def test_an_error_that_comes_as_a_success_is_one(fake: FakeS3, store: S3Storage) -> None:
    """S3 may begin a 200 for a long assembly and then write an error into it."""
    fake.spoils = [Spoil("POST", "status", (200, "InternalError"), query="uploadId=")]
    store.put("x", DATA)
    assert fake.objects == {"run/x": DATA}
    fake.spoils = [Spoil("POST", "status", (200, "InternalError"), query="uploadId=", times=99)]
    with pytest.raises(StorageError, match=r"InternalError|is not there"):
        store.put("y", DATA)
    assert fake.objects == {"run/x": DATA}


def test_parts_grow_with_the_object() -> None:
    from ckpt.storage.s3_upload import MAX_PARTS, PART_BYTES, part_bytes

    assert part_bytes(1) == PART_BYTES
    for size in (10**12, 5 * 10**12):
        assert size / part_bytes(size) <= MAX_PARTS
        assert part_bytes(size) % 2**20 == 0


@pytest.mark.parametrize("length", [10, 64, 65, 1000])
def test_long_reads_go_in_parallel_ranges(
    fake: FakeS3, store: S3Storage, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    monkeypatch.setattr("ckpt.storage.s3.PART_BYTES", 64)
    monkeypatch.setattr("ckpt.storage.s3_session.PART_BYTES", 64)
    fake.objects["run/x"] = DATA
    assert store.read("x", 3, 3 + length) == DATA[3 : 3 + length]
    assert len(fake.requests("GET")) == -(-length // 64)
    with pytest.raises(StorageError, match="too short"):
        store.read("x", 3, len(DATA) + length)


# What is sent


def test_every_upload_carries_its_checksum(
    fake: FakeS3, store: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("x", b"data")
    store.put_new("y", b"data")
    monkeypatch.setattr("ckpt.storage.s3.SINGLE_PUT_BYTES", 3)
    store.put("z", b"data")
    puts = fake.requests("PUT")
    assert len(puts) == 5  # x, two probes, y, the part of z
    if isinstance(store, ObstoreStorage):  # the bytes of x and z are part of the signature
        digest = hashlib.sha256(b"data").hexdigest()
        for head in (puts.pop(0), puts.pop(-1)):
            assert head["x-amz-content-sha256"] == digest
    for head in puts:
        assert head["x-amz-sdk-checksum-algorithm"] == "CRC32"
        assert "aws-chunked" not in head.get("content-encoding", "")
    crc = b64encode(zlib.crc32(b"data").to_bytes(4, "big")).decode()
    sent = [head["x-amz-checksum-crc32"] for head in puts]
    assert sent.count(crc) == (1 if isinstance(store, ObstoreStorage) else 3)


@pytest.mark.parametrize("kind", [S3Storage, ObstoreStorage])
def test_the_checksum_can_be_left_out(fake: FakeS3, kind: type[S3Storage]) -> None:
    store = kind("s3://bucket/run", options(fake, upload_checksum="none"), QUICK)
    store.put("x", b"data")
    (head,) = fake.requests("PUT")
    assert not [name for name in head if "checksum" in name]
    if kind is ObstoreStorage:
        assert head["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD"
    store.close()
    with pytest.raises(ConfigError, match=r"upload_checksum must be one of .* got 'md5'"):
        S3Storage("s3://bucket/run", options(fake, upload_checksum="md5"))


@pytest.mark.usefixtures("fake")
def test_obstore_says_what_is_wrong_with_acertificate(tmp_path) -> None:
    with fake_s3(certificate(tmp_path, self_signed=True)) as secure:
        more = {"client_kwargs": {"verify": str(tmp_path / "ca.pem")}}
        store = ObstoreStorage("s3://bucket/run", options(secure, **more), QUICK)
        with pytest.raises(ConfigError, match=r"CaUsedAsEndEntity.*backend='s3fs'"):
            store.put("x", b"data")
        store.close()
        store = S3Storage("s3://bucket/run", options(secure, **more), QUICK)
        store.put("x", b"data")
        store.close()


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("by", ["option", "AWS_CA_BUNDLE"])
def test_obstore_trusts_whom_s3fs_trusts(tmp_path, monkeypatch, by: str) -> None:
    with fake_s3(certificate(tmp_path)) as secure:
        stranger = ObstoreStorage("s3://bucket/run", options(secure), QUICK)
        with pytest.raises(ConfigError, match=r"certificate \(UnknownIssuer\).*AWS_CA_BUNDLE"):
            stranger.put("x", b"data")
        stranger.close()
        more: dict[str, object] = {}
        if by == "option":
            more = {"client_kwargs": {"verify": str(tmp_path / "ca.pem")}}
        else:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "ca.pem"))
        store = ObstoreStorage("s3://bucket/run", options(secure, **more), QUICK)
        store.put("x", b"data")
        assert store.read("x") == b"data"
        store.close()
        (head,) = secure.requests("PUT")
        assert head["x-amz-content-sha256"] == hashlib.sha256(b"data").hexdigest()


@pytest.mark.usefixtures("fake")
def test_obstore_finds_credentials_where_s3fs_does(fake: FakeS3, monkeypatch, tmp_path) -> None:
    (tmp_path / "credentials").write_text(
        f"[trainer]\naws_access_key_id = from-profile\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", fake.url)
    store = ObstoreStorage("s3://bucket/run", {"profile": "trainer"}, QUICK)
    store.put("x", b"data")
    store.close()
    (head,) = fake.requests("PUT")
    assert "Credential=from-profile/" in head["authorization"]
    store = ObstoreStorage("s3://bucket/run", {"anon": True, "endpoint_url": fake.url}, QUICK)
    assert store.read("x") == b"data"
    store.close()
    assert "authorization" not in fake.requests("GET")[0]


@pytest.mark.usefixtures("fake")
def test_uploads_over_tls_are_not_chunked(tmp_path) -> None:
    """Older Ceph refuses the trailing checksum that botocore would send over TLS (411)."""
    with fake_s3(certificate(tmp_path)) as secure:
        more = {"client_kwargs": {"verify": str(tmp_path / "ca.pem")}}
        store = S3Storage("s3://bucket/run", options(secure, **more), QUICK)
        store.put("x", b"data")
        assert store.read("x") == b"data"
        store.put_new("y", b"data")
        store.close()
        for head in secure.requests("PUT"):
            assert head["x-amz-checksum-crc32"]
            assert "transfer-encoding" not in head
            assert "x-amz-trailer" not in head
            assert int(head["content-length"]) == (1 if "if-none-match" in head else 4) or (
                head["content-length"] == "4"
            )


# Secrets


def everything(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + repr(error) + repr(vars(error))


def test_no_error_shows_a_secret(fake: FakeS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "environment-token-value")
    leak = f"{SECRET} environment-token-value {fake.url}?X-Amz-Signature=abcdef"
    fake.spoils = [
        Spoil(method, "status", (403, "AccessDenied"), times=99, message=leak)
        for method in ("PUT", "GET", "DELETE", "POST")
    ]
    store = S3Storage("s3://bucket/run", options(fake), QUICK)
    calls = [
        lambda: store.read("x"),
        lambda: store.list("x"),
        lambda: store.put("x", b"1"),
        lambda: store.put_new("x", b"1"),
        lambda: store.delete("x"),
        lambda: store.delete_tree("x"),
    ]
    for call in calls:
        with pytest.raises(StorageError, match=r"\*\*\*") as caught:
            call()
        for secret in (SECRET, "environment-token-value", "abcdef"):
            assert secret not in everything(caught.value)
    assert SECRET not in repr(store) + store.url + repr(vars(store)["_redact"])
    store.close()


def test_no_unknown_outcome_shows_a_secret(fake: FakeS3, store: S3Storage) -> None:
    fake.spoils = [Spoil("PUT", "status", key="run/x", times=99, message=f"a {SECRET}")]
    with pytest.raises(CommitUnknown) as caught:
        store.put_new("x", b"mine")
    assert SECRET not in everything(caught.value)


def test_an_endpoint_with_a_password_is_not_shown(fake: FakeS3) -> None:
    port = fake.url.rpartition(":")[2]
    endpoint = f"http://user:pass-word@127.0.0.2:{int(port)}"
    store = S3Storage("s3://bucket/run", options(fake, endpoint_url=endpoint), QUICK)
    with pytest.raises(StorageError) as caught:
        store.read("x")
    assert "pass-word" not in everything(caught.value)
    store.close()


@pytest.mark.parametrize(
    "url", ["s3://key:hush-hush@bucket/run", "s3://bucket/run?token=hush-hush", "s3:///x", "s3://"]
)
def test_urls_hold_no_secrets(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_storage(url)
    assert "hush" not in everything(caught.value)


def test_a_prefix_stays_in_the_bucket() -> None:
    with pytest.raises(StorageError, match="below it"):
        open_storage("s3://bucket/a/../b")
