"""Leases are renewed in time, whatever else goes on, and given back when they are not needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ckpt.errors import ConfigError, NoCheckpoint, StorageError
from ckpt.handoff.backoff import Backoff, Setbacks
from ckpt.handoff.lease_keeper import LeaseKeeper
from ckpt.handoff.sizes import parse_size


class Book:
    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.taken: list[str] = []
        self.released: list[str] = []
        self.problem: Exception | None = None

    def lease(self, v: str, holder: str, ttl_s: float) -> None:
        assert (holder, ttl_s) == ("me", 0.3)
        with self.mutex:
            if self.problem is not None:
                raise self.problem
            self.taken.append(v)

    def release(self, v: str, holder: str) -> None:
        with self.mutex:
            if self.problem is not None:
                raise self.problem
            self.released.append(v)


@pytest.fixture
def book() -> Book:
    return Book()


@pytest.fixture
def failures() -> list[int]:
    return []


@pytest.fixture
def keeper(book: Book, failures: list[int]) -> Iterator[LeaseKeeper]:
    keeper = LeaseKeeper(book, "me", 0.3, on_failure=lambda: failures.append(1))
    keeper.start()
    yield keeper
    keeper.stop()


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_what_is_kept_is_renewed_and_then_given_back(book: Book, keeper: LeaseKeeper) -> None:
    keeper.keep(["a", "b"])
    until(lambda: book.taken.count("a") > 3 and book.taken.count("b") > 3)
    assert max(keeper.ages().values()) < 0.3
    keeper.keep(["b"])
    until(lambda: book.released == ["a"])
    count = book.taken.count("a")
    seen = book.taken.count("b")
    until(lambda: book.taken.count("b") > seen + 2)
    assert book.taken.count("a") == count


def test_what_was_taken_for_a_pull_stays_though_others_are_kept(
    book: Book, keeper: LeaseKeeper
) -> None:
    keeper.take("new")
    keeper.keep(["old"])
    until(lambda: book.taken.count("new") > 3)
    assert book.released == []
    keeper.drop("new")
    until(lambda: book.released == ["new"])


def test_a_store_that_fails_is_asked_again(
    book: Book, keeper: LeaseKeeper, failures: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    keeper.keep(["a"])
    until(lambda: book.taken)
    book.problem = StorageError("HTTP 503")
    until(lambda: len(failures) > 2)
    book.problem = None
    seen = len(book.taken)
    until(lambda: len(book.taken) > seen)
    book.problem = StorageError("HTTP 503")
    keeper.keep([])
    until(lambda: "cannot give the lease of a back" in caplog.text)
    book.problem = None
    until(lambda: book.released == ["a"])


def test_a_version_that_is_gone_is_said_once(
    book: Book, keeper: LeaseKeeper, caplog: pytest.LogCaptureFixture, failures: list[int]
) -> None:
    book.problem = NoCheckpoint("no a")
    keeper.keep(["a"])
    until(lambda: "gone from the root" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("gone from the root") == 1
    assert failures == []
    assert keeper.ages() == {}


def test_a_failed_take_is_the_callers_to_handle(book: Book, keeper: LeaseKeeper) -> None:
    book.problem = StorageError("HTTP 503")
    with pytest.raises(StorageError):
        keeper.take("a")
    assert keeper.ages() == {}


def test_a_stop_leaves_the_leases(book: Book, keeper: LeaseKeeper) -> None:
    keeper.keep(["a"])
    until(lambda: book.taken)
    keeper.stop()
    until(lambda: not keeper.alive)
    assert book.released == []


def test_pauses_double_up_to_a_cap_with_jitter_and_begin_anew() -> None:
    pauses = [Backoff(1.0, 8.0).failed() for _ in range(200)]
    assert all(0.5 <= pause <= 1.0 for pause in pauses)
    assert len(set(pauses)) > 100
    backoff = Backoff(1.0, 8.0)
    for low, high in ((0.5, 1), (1, 2), (2, 4), (4, 8), (4, 8)):
        assert low <= backoff.failed() <= high
    backoff.succeeded()
    assert backoff.failed() <= 1.0
    assert Backoff(1.0, 8.0).failed() <= 1.0
    long = Backoff(1.0, 8.0)
    for _ in range(2000):
        assert long.failed() <= 8.0


def test_setbacks_wait_longer_each_time_and_are_forgotten() -> None:
    now = [0.0]
    setbacks = Setbacks(4.0, 100.0, clock=lambda: now[0])
    assert not setbacks.waiting("a")
    for low, high in ((2, 4), (4, 8), (8, 16)):
        setbacks.add("a", "bad")
        now[0] += low - 0.01
        assert setbacks.waiting("a")
        now[0] += high - low + 0.02
        assert not setbacks.waiting("a")
    assert setbacks.reasons() == {"a": "bad"}
    assert not setbacks.waiting("b")
    setbacks.forget("a")
    assert setbacks.reasons() == {}
    for _ in range(20):
        setbacks.add("b", "full", cap_s=5.0)
    now[0] += 5.0
    assert not setbacks.waiting("b")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500B", 500),
        ("2K", 2000),
        ("2KB", 2000),
        ("3MiB", 3 << 20),
        (" 20GiB ", 20 << 30),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size("it", text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5G", "GiB", "1PB", "1 G B", "\uff11"])
def test_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="it must be a size"):
        parse_size("it", text)
