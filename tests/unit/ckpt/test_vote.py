"""The board: deadlines, large notes, cleaning up, and errors on their way to other ranks."""

from __future__ import annotations

import datetime
import threading
import time

import pytest
from torch.distributed import HashStore, TCPStore

from ckpt.errors import (
    BaseMismatch,
    PlanError,
    SaveAborted,
    StorageError,
    Superseded,
    VoteTimeout,
)
from ckpt.rendezvous import _candidates, _listen, join
from ckpt.vote import Board, Failure, RemoteFailure


@pytest.fixture
def store():
    return HashStore()


def boards(store, world=2, timeout=5.0):
    return [Board(store, rank, world, timeout) for rank in range(world)]


def test_answers_are_gathered_by_rank(store):
    zero, one = boards(store)
    one.answer("t", {"x": 1})
    zero.answer("t", [0])
    assert zero.gather("t") == [[0], {"x": 1}]
    assert one.peek("t", 0) == [0]
    assert one.peek("u", 0) is None


def test_late_ranks_are_named_within_the_deadline(store):
    zero = Board(store, 0, 4, 0.3)
    for rank in (0, 2):
        Board(store, rank, 4, 1).answer("t", None)
    began = time.monotonic()
    with pytest.raises(VoteTimeout, match=r"rank 1, 3 did not answer within 0\.3 s"):
        zero.gather("t")
    assert time.monotonic() - began < 2


def test_a_failure_ends_the_wait_at_once(store):
    zero, one = boards(store, timeout=60)
    one.fail("t", StorageError("disk full"))
    with pytest.raises(RemoteFailure) as caught:
        zero.gather("t")
    error = caught.value.failure.rebuild()
    assert type(error) is SaveAborted
    assert str(error) == "rank 1: StorageError: disk full"


def test_a_contrary_path_ends_the_wait_at_once(store):
    zero, one = boards(store, timeout=60)
    one.mark("other")
    with pytest.raises(PlanError, match="on some ranks only"):
        zero.gather("t", contrary="other")


def test_decisions_reach_those_who_wait_and_those_who_come_late(store):
    zero, one = boards(store)
    seen = []
    waiter = threading.Thread(target=lambda: seen.append(one.verdict("t").value))
    waiter.start()
    zero.decide("t", {"go": True})
    waiter.join(5)
    assert seen == [{"go": True}]
    assert one.verdict("t").value == {"go": True}
    zero.abort("u", Superseded("writer 2"))
    failure = one.verdict("u").failure
    assert type(failure.rebuild()) is Superseded


def test_no_decision_is_a_timeout(store):
    with pytest.raises(VoteTimeout, match="rank 0 decided nothing"):
        Board(store, 1, 2, 0.1).verdict("t")


@pytest.mark.parametrize(
    ("error", "kept", "plain"),
    [
        (PlanError("x"), PlanError, PlanError),
        (BaseMismatch("x"), BaseMismatch, BaseMismatch),
        (VoteTimeout("x"), VoteTimeout, VoteTimeout),
        (StorageError("x"), StorageError, SaveAborted),
        (KeyError("x"), SaveAborted, SaveAborted),
    ],
)
def test_which_class_an_error_has_elsewhere(error, kept, plain):
    failure = Failure.of(error, 3)
    assert type(failure.rebuild()) is plain
    assert type(failure.rebuild(keep=True)) is kept
    assert "rank 3" in str(failure.rebuild())
    assert Failure.of(RemoteFailure(failure), 0) is failure


def test_large_notes_pass_the_stores_limit_and_are_forgotten():
    server = TCPStore("127.0.0.1", 0, None, True, datetime.timedelta(seconds=10), False)
    client = TCPStore("127.0.0.1", server.port, None, False, datetime.timedelta(seconds=10), False)
    before = server.num_keys()
    zero, one = Board(server, 0, 2, 10), Board(client, 1, 2, 10)
    text = "x" * (17 * 1024 * 1024)
    one.answer("t", text)
    zero.answer("t", "")
    one.mark("t")
    assert zero.gather("t") == ["", text]
    zero.decide("t", None)
    zero.forget(["t"])
    assert server.num_keys() == before


def test_a_dead_store_is_an_error_that_says_so():
    server = TCPStore("127.0.0.1", 0, None, True, datetime.timedelta(seconds=10), False)
    client = TCPStore("127.0.0.1", server.port, None, False, datetime.timedelta(seconds=10), False)
    one = Board(client, 1, 2, 10)
    one.answer("t", 1)
    del server
    with pytest.raises(SaveAborted, match="rank 0 and its store are gone"):
        one.verdict("t")
    one.farewell(1)  # leaving needs nothing from rank 0


def test_farewell_waits_for_all_but_not_for_ever(store, caplog):
    zero, one = boards(store)
    one.farewell(1)
    zero.farewell(5)
    assert not caplog.records
    Board(HashStore(), 0, 2, 5).farewell(0.1)
    assert "rank 1 did not close" in caplog.text


def test_the_store_listens_on_one_address_only():
    for master in ("", "127.0.0.1", "localhost"):
        host, sock = _listen(master)
        with sock:
            assert sock.getsockname()[0] == host
            assert host in {"127.0.0.1", "::1"}
    assert "0.0.0.0" not in _candidates("localhost")


def test_without_a_process_group_there_is_one_rank():
    ranks = join(None, 1)
    assert (ranks.rank, ranks.world) == (0, 1)
    assert len(ranks.nonce) == 24
    ranks.release()
