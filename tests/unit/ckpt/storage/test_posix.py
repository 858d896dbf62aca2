"""POSIX: durable in the right order, exclusive, and never outside its root."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.errors import AlreadyExists, ConfigError, ObjectNotFound, StorageError
from ckpt.storage.posix import PosixStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> PosixStorage:
    return PosixStorage(root)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_opening_makes_nothing(tmp_path: Path) -> None:
    storage = PosixStorage(tmp_path / "a" / "b")
    assert storage.list("") == []
    assert not (tmp_path / "a").exists()
    storage.put("c/d", b"1")
    assert (tmp_path / "a/b/c/d").read_bytes() == b"1"


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(ConfigError, match="x is a file; the root of a store must be a directory"):
        PosixStorage(tmp_path / "x")


def test_local_path(store: PosixStorage, root: Path) -> None:
    assert store.local_path("a/b") == root / "a/b"
    assert store.local_path("") == root
    assert store.has_rename


def order_of_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of durable steps as they happen: fsync of files and directories, and new names."""
    calls: list[str] = []
    real_fsync, real_link, real_replace, real_rename = os.fsync, os.link, Path.replace, Path.rename

    def fsync(fd: int) -> None:
        calls.append("fsync dir" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        real_fsync(fd)

    def link(*args, **kwargs) -> None:
        calls.append("link")
        real_link(*args, **kwargs)

    def replace(self, target) -> None:
        calls.append("rename")
        real_replace(self, target)

    def rename(self, target) -> None:
        calls.append("rename dir")
        real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "rename", rename)
    return calls


def test_content_is_durable_before_its_name(store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = order_of_calls(monkeypatch)
    store.put("x", b"1")
    assert calls == ["fsync file", "rename", "fsync dir"]
    calls.clear()
    store.put_stream("y", [b"1"], 1)
    assert calls == ["fsync file", "rename", "fsync dir"]
    calls.clear()
    store.put_new("z", b"1")
    assert calls == ["fsync file", "link", "fsync dir"]
    calls.clear()
    store.delete("z")
    assert calls == ["fsync dir"]


def test_new_directories_are_durable_in_their_parents(store, monkeypatch) -> None:
    calls = order_of_calls(monkeypatch)
    store.put("a/b/x", b"1")
    assert calls == ["fsync dir", "fsync dir", "fsync file", "rename", "fsync dir"]


def test_a_moved_directory_is_durable_in_both_parents(store, monkeypatch) -> None:
    store.put("a/x", b"1")
    calls = order_of_calls(monkeypatch)
    store.rename_dir("a", "b")
    assert calls == ["rename dir", "fsync dir"]
    calls.clear()
    store.put("c/x", b"1")
    calls.clear()
    store.rename_dir("b", "c/b")
    assert calls == ["rename dir", "fsync dir", "fsync dir"]


@pytest.mark.parametrize("put", ["put", "put_new", "put_stream"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_write_leaves_nothing(store, root, monkeypatch, put: str, code: int) -> None:
    store.put("d/old", b"old")
    real, calls = os.writev, []

    def writev(fd: int, buffers: list[memoryview]) -> int:
        calls.append(fd)
        if len(calls) > 1:
            raise OSError(code, os.strerror(code))
        return real(fd, [buffers[0][:1]])

    monkeypatch.setattr(os, "writev", writev)
    calls_of = {
        "put": lambda: store.put("d/old", b"123456"),
        "put_stream": lambda: store.put_stream("d/old", [b"123456"], 6),
        "put_new": lambda: store.put_new("d/new", b"123456"),
    }
    with pytest.raises(StorageError) as caught:
        calls_of[put]()
    assert caught.value.errno == code
    assert os.strerror(code) in str(caught.value)
    assert str(root / "d") in str(caught.value)
    monkeypatch.undo()
    assert names(root / "d") == ["old"]
    assert store.read("d/old") == b"old"


@pytest.mark.parametrize("put", ["put", "put_new"])
def test_a_failed_fsync_is_a_failed_write(store, root, monkeypatch, put: str) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StorageError, match="Input/output error"):
        getattr(store, put)("x", b"123")
    assert names(root) == []


def test_a_real_limit_on_file_size(root: Path) -> None:
    """The kernel itself refuses the second megabyte; nothing may be left of the first."""
    code = f"""
import resource, signal
from ckpt.errors import StorageError
from ckpt.storage.posix import PosixStorage
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
store = PosixStorage({str(root)!r})
store.put("fits", bytes(2**20))
for call in (store.put, store.put_new):
    try:
        call("x", [bytes(2**20), b"1"] if call == store.put else bytes(2**20 + 1))
    except StorageError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("File too large") == 2
    assert names(root) == ["fits"]


def test_short_writes_are_continued(store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.writev

    def writev(fd: int, buffers: list[memoryview]) -> int:
        return real(fd, [buffers[0][:3]])

    monkeypatch.setattr(os, "writev", writev)
    store.put("x", [b"01234", b"5", b"6789abcdef"])
    assert store.read("x") == b"0123456789abcdef"


def test_short_reads_are_continued(store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", b"0123456789")
    real_pread, real_preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real_pread(fd, min(n, 3), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real_preadv(fd, [views[0][:3]], at))
    assert store.read("x", 1) == b"123456789"
    target = bytearray(9)
    store.read_into("x", 1, memoryview(target))
    assert target == b"123456789"


def test_a_file_that_shrinks_while_it_is_read(store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("x", b"0123456789")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: real(fd, 3, at) if at == 0 else b"")
    with pytest.raises(StorageError, match="wanted bytes up to 10, the file ends at 3"):
        store.read("x")


def test_many_large_pieces(store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.storage.posix_write.CALL_BYTES", 7)
    data = os.urandom(20_000)
    store.put("x", [data[:3], data[3:]])
    assert store.read("x") == data
    store.put_stream("y", [data[:3], data[3:]], len(data))
    assert store.read("y") == data


def test_many_small_pieces_are_few_calls(store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: calls.append(len(views)) or real(fd, views))
    pieces = [bytes([i % 256]) * 5 for i in range(1500)]
    store.put("x", pieces)
    assert store.read("x") == b"".join(pieces)
    assert calls == [512, 512, 476]


def test_the_disk_begins_while_later_bytes_are_written(
    store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every byte is begun once and in order; what an unwilling system answers does not matter."""
    monkeypatch.setattr("ckpt.storage.posix_write.CALL_BYTES", 100)
    begun = []

    def refuse(fd: int, start: int, length: int, flags: int) -> int:
        assert start + length == os.lseek(fd, 0, os.SEEK_CUR)
        begun.append((start, length))
        return -1

    monkeypatch.setattr("ckpt.storage.posix_write._sync_file_range", refuse)
    data = os.urandom(1050)
    store.put("x", data)
    assert begun == [(start, 100) for start in range(0, 1000, 100)]
    del begun[:]
    store.put_stream("y", [data[i : i + 30] for i in range(0, 1050, 30)], 1050)
    assert begun == [(start, 120) for start in range(0, 960, 120)]
    monkeypatch.setattr("ckpt.storage.posix_write._sync_file_range", None)
    store.put("z", data)
    assert store.read("x") == store.read("y") == store.read("z") == data


def test_without_durability_nothing_waits_for_the_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    monkeypatch.setattr("ckpt.storage.posix_write.CALL_BYTES", 100)
    monkeypatch.setattr(
        "ckpt.storage.posix_write._sync_file_range", lambda *args: calls.append(args)
    )
    monkeypatch.setattr(os, "fsync", calls.append)
    store = PosixStorage(root, durable=False)
    data = os.urandom(1050)
    store.put("a/x", data)
    store.put_stream("a/y", [data], 1050)
    store.put_new("a/z", data)
    store.rename_dir("a", "b")
    assert store.read("b/x") == store.read("b/y") == store.read("b/z") == data
    store.delete("b/x")
    store.delete_tree("b")
    assert calls == []


# Links


def test_links_may_not_lead_out(store, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    (root / "dir").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    (root / "up").symlink_to("..")
    for path in ("dir/secret", "file", "up/outside/secret"):
        for call in (store.read, store.size, store.exists):
            with pytest.raises(StorageError, match="a symbolic link leads out of"):
                call(path)
    for call in (
        lambda: store.put("dir/new", b"1"),
        lambda: store.put_new("dir/new", b"1"),
        lambda: store.put_stream("dir/new", [b"1"], 1),
        lambda: store.delete("dir/secret"),
        lambda: store.delete_tree("up/outside"),
        lambda: store.rename_dir("dir/secret", "stolen"),
        lambda: store.rename_dir("up/outside", "stolen"),
        lambda: store.list("dir"),
    ):
        with pytest.raises(StorageError, match="a symbolic link leads out of"):
            call()
    assert [entry.name for entry in store.list("")] == ["dir", "file", "up"]
    assert names(outside) == ["secret"]


def test_links_inside_are_followed(store, root: Path) -> None:
    store.put("real/x", b"1")
    (root / "alias").symlink_to("real")
    assert store.read("alias/x") == b"1"


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(root)
    store = PosixStorage(tmp_path / "alias")
    store.put("x", b"1")
    assert (root / "x").read_bytes() == b"1"


def test_deleting_a_tree_follows_no_link(store, root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"1")
    store.put("d/x", b"1")
    (root / "d" / "link").symlink_to(outside)
    store.delete_tree("d")
    assert not (root / "d").exists()
    assert (outside / "keep").exists()
    (root / "link").symlink_to(outside)
    with pytest.raises(StorageError):
        store.delete_tree("link")
    assert (outside / "keep").exists()


def test_writing_replaces_a_link_within_the_root(store, root: Path) -> None:
    store.put("target", b"old")
    (root / "link").symlink_to("target")
    store.put("link", b"new")
    assert store.read("link") == b"new"


def test_pipes_are_no_files(store, root: Path) -> None:
    os.mkfifo(root / "pipe")
    with pytest.raises(ObjectNotFound, match="not a file"):
        store.read("pipe")
    assert not store.exists("pipe")


# Exclusive create and rename


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_without_hard_links_it_is_still_exclusive(store, root, monkeypatch, code: int) -> None:
    def link(*args, **kwargs) -> None:
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", link)
    store.put_new("x", b"first")
    with pytest.raises(AlreadyExists, match="x exists already"):
        store.put_new("x", b"second")
    assert store.read("x") == b"first"
    assert names(root) == ["x"]


def test_another_error_of_link_is_an_error(store, root, monkeypatch) -> None:
    def link(*args, **kwargs) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(StorageError, match="create failed: Input/output error"):
        store.put_new("x", b"first")
    assert names(root) == []


def test_a_link_whose_answer_was_lost_counts(store, monkeypatch) -> None:
    real = os.link

    def link(source, target, **kwargs) -> None:
        real(source, target, **kwargs)
        raise FileExistsError(errno.EEXIST, "repeated by the network")

    monkeypatch.setattr(os, "link", link)
    store.put_new("x", b"mine")
    assert store.read("x") == b"mine"


def test_put_new_on_a_directory(store) -> None:
    store.put("d/x", b"1")
    with pytest.raises(AlreadyExists):
        store.put_new("d", b"1")
    with pytest.raises(StorageError, match="write failed"):
        store.put("d", b"1")


@pytest.mark.parametrize("content", [[], ["file"]])
def test_rename_never_replaces(store, root: Path, content: list[str]) -> None:
    store.put("new/x", b"1")
    (root / "taken").mkdir()
    for name in content:
        (root / "taken" / name).write_bytes(b"old")
    with pytest.raises(AlreadyExists, match="taken exists already"):
        store.rename_dir("new", "taken")
    store.put("a-file", b"1")
    with pytest.raises(AlreadyExists):
        store.rename_dir("new", "a-file")
    assert store.read("new/x") == b"1"
    with pytest.raises(ObjectNotFound):
        store.rename_dir("missing", "free")


def test_rename_loses_a_race(store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("new/x", b"1")
    store.put("taken/y", b"2")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(AlreadyExists):
        store.rename_dir("new", "taken")
    assert store.read("taken/y") == b"2"


def test_long_names_leave_room_for_the_temporary_name(store) -> None:
    store.put("ä" * 127, b"1")
    assert store.read("ä" * 127) == b"1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_an_error_not_a_missing_one(store, root: Path) -> None:
    store.put("x", b"1")
    (root / "x").chmod(0)
    with pytest.raises(StorageError, match="Permission denied") as caught:
        store.read("x")
    assert not isinstance(caught.value, ObjectNotFound)
