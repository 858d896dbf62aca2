"""Large files from page-aligned memory pass the page cache by; all others go through it."""

import ctypes
import errno
import fcntl
import mmap
import os
import threading

import pytest

import ckpt.storage.posix_write as module
from ckpt.arena import Slot
from ckpt.shard import ShardLayout
from ckpt.storage.posix_write import DIRECT_BYTES, PAGE, write_all

DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def calls(monkeypatch):
    """Each call's length, and whether it passed the page cache by.

    Only this thread's: one that an earlier test left at work may write through ``os`` as well.
    """
    seen = []
    writev = os.writev
    mine = threading.get_ident()

    def recorded(fd, buffers):
        written = writev(fd, buffers)
        if threading.get_ident() == mine:
            seen.append((written, bool(fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT)))
        return written

    monkeypatch.setattr(module.os, "writev", recorded)
    return seen


def memory(size):
    """Memory that begins at a page, with bytes that are nowhere the same for long."""
    view = memoryview(mmap.mmap(-1, size + PAGE))[:size]
    pattern = bytes(range(251)) * 4096
    for start in range(0, size, len(pattern)):
        part = view[start : start + len(pattern)]
        part[:] = pattern[: len(part)]
    return view


def written(path, views, **options):
    with path.open("wb", buffering=0) as file:
        write_all(file.fileno(), views, **options)
        os.fsync(file.fileno())
        flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
    assert path.read_bytes() == b"".join(views)
    return flags


def takes_direct_writes(folder):
    try:
        os.close(os.open(folder / "try", os.O_CREAT | os.O_WRONLY | DIRECT))
    except OSError:
        return False
    return DIRECT != 0


@pytest.mark.parametrize("rest", [0, 1, PAGE - 1, 3 * PAGE + 17])
def test_a_large_file_passes_the_page_cache_by_up_to_its_last_page(tmp_path, calls, rest):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system has no direct writes")
    size = 2 * DIRECT_BYTES + rest
    written(tmp_path / "file", [memory(size)])
    assert sum(length for length, _ in calls) == size
    direct = sum(length for length, is_direct in calls if is_direct)
    assert direct == size - size % PAGE
    assert len(calls) >= 2


@pytest.mark.parametrize(
    "views",
    [
        lambda: [memory(DIRECT_BYTES - PAGE)],
        lambda: [memory(DIRECT_BYTES + 2 * PAGE)[64:]],
        lambda: [memoryview(bytes(memory(DIRECT_BYTES)))],
        lambda: [memory(3), memory(DIRECT_BYTES + 5)],
    ],
    ids=["small", "not at a page", "read-only", "not at a position of a page"],
)
def test_others_go_through_it(tmp_path, calls, views):
    written(tmp_path / "file", views())
    assert calls
    assert not any(is_direct for _, is_direct in calls)


def test_what_nobody_syncs_goes_through_it(tmp_path, calls):
    written(tmp_path / "file", [memory(DIRECT_BYTES)], eager=False)
    assert not any(is_direct for _, is_direct in calls)


def test_a_file_system_that_wants_larger_blocks_gets_the_bytes_through_it(tmp_path, monkeypatch):
    if not takes_direct_writes(tmp_path):
        pytest.skip("this file system has no direct writes")
    writev = os.writev
    refused = []

    def choosy(fd, buffers):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT:
            refused.append(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return writev(fd, buffers)

    monkeypatch.setattr(module.os, "writev", choosy)
    flags = written(tmp_path / "file", [memory(DIRECT_BYTES + 5)])
    assert len(refused) == 1
    assert not flags & DIRECT


def test_a_write_cut_short_goes_on_where_it_stopped(tmp_path, monkeypatch):
    writev = os.writev
    lengths = iter([PAGE, 1000, 3 * PAGE])

    def short(fd, buffers):
        length = next(lengths, None)
        if length is None or (fcntl.fcntl(fd, fcntl.F_GETFL) & DIRECT and length % PAGE):
            return writev(fd, buffers)
        return writev(fd, [buffers[0][:length]])

    monkeypatch.setattr(module.os, "writev", short)
    written(tmp_path / "file", [memory(DIRECT_BYTES + PAGE)])


def test_a_full_disk_is_still_an_error(tmp_path, monkeypatch):
    def full(fd, buffers):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "writev", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", [memory(DIRECT_BYTES)])


def test_the_slots_of_an_arena_begin_at_pages():
    for size in (100, 5000):
        layout = ShardLayout(header=b"head", offsets={}, size=size)
        buffer = Slot(layout, [], pinned=False).buffer()
        assert len(buffer) == size
        assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % PAGE == 0
