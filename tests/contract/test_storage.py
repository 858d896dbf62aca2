"""One suite over every store: what the pipelines rely on, they rely on everywhere."""

from __future__ import annotations

import concurrent.futures
import os
import pickle
import threading
import uuid
from collections.abc import Iterator

import pytest
from support.buckets import registered

from ckpt.checksum import file_record
from ckpt.errors import AlreadyExists, DamagedError, ObjectNotFound, StorageError
from ckpt.storage import Entry, Storage, Traffic, open_storage, put_checked, read_checked

STORES = [
    "posix",
    "memory",
    "gs",
    "az",
    pytest.param("s3", marks=pytest.mark.s3),
    pytest.param("s3-obstore", marks=pytest.mark.s3),
]


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path) -> Iterator[Storage]:
    if request.param == "posix":
        storage = open_storage(tmp_path / "root")
    elif request.param == "memory":
        storage = open_storage(f"memory://contract-{uuid.uuid4().hex}/run")
    elif request.param in {"gs", "az"}:
        with registered():  # stand-ins for the packages
            storage = open_storage(f"{request.param}://contract/run")
            yield storage
            storage.close()
        return
    else:
        server = request.getfixturevalue("s3")
        backend = "obstore" if request.param == "s3-obstore" else "s3fs"
        storage = open_storage(server.url("contract"), server.options_for(backend))
    yield storage
    storage.close()


def test_keeps_the_protocol(store: Storage) -> None:
    assert isinstance(store, Storage)


def test_put_then_read(store: Storage) -> None:
    store.put("steps/a/x.bin", b"0123456789")
    assert store.read("steps/a/x.bin") == b"0123456789"
    assert store.read("steps/a/x.bin", 3, 7) == b"3456"
    assert store.read("steps/a/x.bin", 3) == b"3456789"
    assert store.read("steps/a/x.bin", 10, 10) == b""
    assert store.size("steps/a/x.bin") == 10
    assert store.exists("steps/a/x.bin")


def test_put_takes_many_buffers(store: Storage) -> None:
    whole = os.urandom(5000)
    store.put("x", [whole[:1], b"", bytearray(whole[1:7]), memoryview(whole)[7:]])
    assert store.read("x") == whole


def test_put_takes_a_thousand_small_buffers(store: Storage) -> None:
    pieces = [bytes([n % 256]) * (n % 7) for n in range(1500)]
    store.put("x", pieces)
    assert store.read("x") == b"".join(pieces)


def test_put_replaces(store: Storage) -> None:
    store.put("x", b"old and longer")
    store.put("x", b"new")
    assert store.read("x") == b"new"
    assert store.size("x") == 3


def test_empty_file(store: Storage) -> None:
    store.put("d/empty", b"")
    assert store.size("d/empty") == 0
    assert store.read("d/empty") == b""
    assert store.list("d") == [Entry("empty", False, 0)]


def test_read_into_fills_in_place(store: Storage) -> None:
    store.put("x", b"0123456789")
    target = bytearray(b"........")
    store.read_into("x", 2, memoryview(target)[1:6])
    assert target == b".23456.."


@pytest.mark.parametrize(("start", "end"), [(0, 11), (10, 11), (50, 60), (11, 11)])
def test_a_short_file_is_an_error(store: Storage, start: int, end: int) -> None:
    store.put("x", b"0123456789")
    with pytest.raises(StorageError, match="too short"):
        store.read("x", start, end)
    with pytest.raises(StorageError, match="too short"):
        store.read_into("x", start, memoryview(bytearray(end - start)))


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (5, 2)])
def test_a_range_must_be_one(store: Storage, start: int, end: int) -> None:
    store.put("x", b"0123456789")
    with pytest.raises(StorageError, match="not a range"):
        store.read("x", start, end)


def test_a_missing_file_is_object_not_found_with_its_path(store: Storage) -> None:
    for call in (store.read, store.size):
        with pytest.raises(ObjectNotFound, match="steps/none") as caught:
            call("steps/none")
        assert store.url in str(caught.value)
    with pytest.raises(ObjectNotFound):
        store.read("steps/none", 0, 4)
    with pytest.raises(ObjectNotFound):
        store.read_into("steps/none", 0, memoryview(bytearray(4)))
    assert not store.exists("steps/none")


def test_a_directory_is_not_a_file(store: Storage) -> None:
    store.put("d/x", b"1")
    assert not store.exists("d")
    with pytest.raises(ObjectNotFound):
        store.size("d")
    with pytest.raises(StorageError):
        store.read("d")


def test_list(store: Storage) -> None:
    for path in ("b", "a/1", "a/2/3", "a/2/4", "a-file"):
        store.put(path, b"xyz")
    assert store.list("") == [
        Entry("a", True, 0),
        Entry("a-file", False, 3),
        Entry("b", False, 3),
    ]
    assert store.list("a") == [Entry("1", False, 3), Entry("2", True, 0)]
    assert store.list("a/2") == [Entry("3", False, 3), Entry("4", False, 3)]
    assert store.list("nothing/here") == []


def test_an_untouched_root_lists_empty(store: Storage) -> None:
    assert store.list("") == []


def test_a_listing_is_never_stale(store: Storage) -> None:
    assert store.list("d") == []
    store.put("d/1", b"")
    assert [entry.name for entry in store.list("d")] == ["1"]
    store.delete("d/1")
    assert store.list("d") in ([], [])
    assert not store.exists("d/1")


def test_what_another_client_does_is_listed(store: Storage) -> None:
    other = pickle.loads(pickle.dumps(store))
    assert store.list("d") == other.list("d") == []
    for name in ("1", "2"):
        store.put(f"d/{name}", b"")
        assert [entry.name for entry in other.list("d")][-1] == name
    other.delete("d/1")
    assert [entry.name for entry in store.list("d")] == ["2"]
    other.close()


def test_listing_beyond_one_page(store: Storage) -> None:
    # An S3 page has 1000 keys; elsewhere there are no pages.
    names = [f"{n:04d}" for n in range(1003 if store.url.startswith("s3:") else 20)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(f"many/{name}", b"1"), names))
    assert [entry.name for entry in store.list("many")] == names
    store.delete_tree("many")
    assert store.list("many") == []


def test_put_new_is_exclusive(store: Storage) -> None:
    store.put_new("claims/1", b"first")
    with pytest.raises(AlreadyExists, match="claims/1"):
        store.put_new("claims/1", b"second")
    assert store.read("claims/1") == b"first"
    store.put_new("claims/2", b"second")


def test_put_new_leaves_nothing_else_behind(store: Storage) -> None:
    store.put_new("claims/1", b"first")
    with pytest.raises(AlreadyExists):
        store.put_new("claims/1", b"second")
    assert [entry.name for entry in store.list("claims")] == ["1"]
    assert [entry.name for entry in store.list("")] == ["claims"]


def test_put_new_has_one_winner_among_many(store: Storage) -> None:
    store.put_new("warm-up", b"")  # so that the race below is one of plain creates
    for attempt in range(3):
        barrier = threading.Barrier(6)

        def claim(me: int, barrier=barrier, attempt=attempt) -> bool:
            barrier.wait(timeout=30)
            try:
                store.put_new(f"race/{attempt}", f"writer {me}".encode())
            except AlreadyExists:
                return False
            return True

        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            won = list(pool.map(claim, range(6)))
        assert won.count(True) == 1
        assert store.read(f"race/{attempt}") == f"writer {won.index(True)}".encode()


def test_concurrent_puts_leave_one_whole_content(store: Storage) -> None:
    contents = [bytes([n]) * 50_000 for n in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda data: store.put("same", data), contents))
    assert store.read("same") in contents
    assert [entry.name for entry in store.list("")] == ["same"]


def test_delete(store: Storage) -> None:
    store.put("d/x", b"1")
    store.put("d/xy", b"2")
    store.delete("d/x")
    store.delete("d/x")
    assert not store.exists("d/x")
    assert store.read("d/xy") == b"2"


def test_delete_tree(store: Storage) -> None:
    for path in ("step-1/a", "step-1/b/c", "step-10/a", "step-1.x"):
        store.put(path, b"1")
    store.delete_tree("step-1")
    store.delete_tree("step-1")
    assert not store.exists("step-1/a")
    assert not store.exists("step-1/b/c")
    assert [entry.name for entry in store.list("")] == ["step-1.x", "step-10"]


def test_rename_dir(store: Storage) -> None:
    store.put("tmp/a", b"1")
    store.put("tmp/b/c", b"2")
    if not store.has_rename:
        with pytest.raises(StorageError, match="cannot rename"):
            store.rename_dir("tmp", "steps/1")
        return
    store.rename_dir("tmp", "steps/1")
    assert store.read("steps/1/a") == b"1"
    assert store.read("steps/1/b/c") == b"2"
    assert [entry.name for entry in store.list("")] == ["steps"]


def test_stream(store: Storage) -> None:
    scratch = bytearray(4)

    def chunks() -> Iterator[bytearray]:
        for letter in b"abc":  # one buffer, used again and again
            scratch[:] = bytes([letter]) * 4
            yield scratch

    store.put_stream("s/x", chunks(), 12)
    assert store.read("s/x") == b"aaaabbbbcccc"


@pytest.mark.parametrize("size", [11, 13])
def test_a_stream_of_another_size_is_refused(store: Storage, size: int) -> None:
    store.put("s/x", b"old")
    with pytest.raises(StorageError, match="nothing was written"):
        store.put_stream("s/x", [b"aaaa", b"bbbb", b"cccc"], size)
    assert store.read("s/x") == b"old"
    assert [entry.name for entry in store.list("s")] == ["x"]


@pytest.mark.parametrize("error", [OSError("mine"), FileNotFoundError("mine"), KeyError("mine")])
def test_an_error_of_the_stream_passes_through(store: Storage, error: Exception) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"aaaa"
        raise error

    with pytest.raises(type(error)) as caught:
        store.put_stream("s/x", chunks(), 8)
    assert caught.value is error
    assert store.list("s") == []


BAD_PATHS = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a\\b", "a\0b", "a\nb", "a/"]


@pytest.mark.parametrize("path", BAD_PATHS)
def test_paths_stay_below_the_root(store: Storage, path: str) -> None:
    calls = [
        lambda: store.read(path),
        lambda: store.read_into(path, 0, memoryview(bytearray(1))),
        lambda: store.size(path),
        lambda: store.exists(path),
        lambda: store.put(path, b"1"),
        lambda: store.put_stream(path, [b"1"], 1),
        lambda: store.put_new(path, b"1"),
        lambda: store.delete(path),
        lambda: store.delete_tree(path),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="below it"):
            call()


def test_put_refuses_what_is_not_bytes(store: Storage) -> None:
    for data in ("text", [1, 2], [b"a", "b"], memoryview(b"abcdef")[::2]):
        with pytest.raises(StorageError, match="bytes"):
            store.put("x", data)
    assert not store.exists("x")


def test_pickles_to_an_equal_store(store: Storage) -> None:
    store.put("x", b"1")
    again = pickle.loads(pickle.dumps(store))
    assert again.url == store.url
    assert again.read("x") == b"1"
    again.close()


def test_close_is_not_the_end(store: Storage) -> None:
    store.put("x", b"1")
    store.close()
    store.close()
    assert store.read("x") == b"1"


def test_threads_share_a_store(store: Storage) -> None:
    def work(n: int) -> bytes:
        store.put(f"t/{n}", str(n).encode() * 100)
        return store.read(f"t/{n}")

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(24))) == [str(n).encode() * 100 for n in range(24)]


@pytest.mark.parametrize("size", [0, 10, 3 * 1024 * 1024 + 5])
def test_checked_write_and_read(store: Storage, size: int) -> None:
    data = os.urandom(size)
    record = put_checked(store, "d/x", [data[: size // 3], data[size // 3 :]], name="x")
    assert record == file_record("x", [data])
    assert read_checked(store, "d/x", record) == data
    assert read_checked(store, "d/x", record, size // 2, size) == data[size // 2 :]


def test_checked_read_finds_one_flipped_bit(store: Storage) -> None:
    record = put_checked(store, "x", b"0123456789", name="x")
    store.put("x", b"0123456788")
    with pytest.raises(DamagedError, match=r"bytes 0 to 10 are damaged"):
        read_checked(store, "x", record, 2, 4)
    with pytest.raises(DamagedError, match="not in a file"):
        read_checked(store, "x", record, 2, 11)


def test_traffic_is_counted(store: Storage) -> None:
    before = store.traffic
    store.put("x", [b"12345", b"678"])
    store.put_stream("y", [b"12345"], 5)
    written = store.traffic - before
    assert (written.sent, written.received) == (13, 0)
    assert written.requests >= 2
    store.put_new("z", b"1")
    before = store.traffic
    store.put_new("z2", b"12")
    # Where the proof that creates are exclusive is due, it has been given: one request.
    assert store.traffic - before == Traffic(1, 2, 0)
    before = store.traffic
    assert store.read("x") == b"12345678"
    store.read("x", 2, 5)
    store.read_into("x", 0, memoryview(bytearray(4)))
    read = store.traffic - before
    assert (read.sent, read.received, read.moved) == (0, 15, 15)
    assert read.requests >= 3
    before = store.traffic
    store.list("")
    store.exists("x")
    store.delete("x")
    asked = store.traffic - before
    assert asked.requests >= 3
    assert asked.moved == 0
