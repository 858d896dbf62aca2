"""Sums of a stream, beside the thread that writes it."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckpt import tally as tally_module
from ckpt.checksum import file_record
from ckpt.tally import Tally


@pytest.mark.parametrize("batch", [1, 64, 10_000])
def test_the_sums_are_those_of_the_whole_stream(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tally_module, "_BATCH_BYTES", batch)
    monkeypatch.setattr(tally_module, "_BATCHES_AHEAD", 2)
    chunks = [bytes([n % 251]) * (n % 40) for n in range(300)]
    with Tally() as tally:
        assert list(tally.over(chunks)) == chunks
        record, sha256 = tally.result("f")
    assert record == file_record("f", chunks)
    assert sha256 == hashlib.sha256(b"".join(chunks)).hexdigest()


def test_the_store_does_not_wait_for_the_sums_but_the_memory_stays_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer gets a number of batches ahead of the sums, and no further."""
    monkeypatch.setattr(tally_module, "_BATCH_BYTES", 1)
    monkeypatch.setattr(tally_module, "_BATCHES_AHEAD", 3)
    gate = threading.Event()
    real = tally_module._update

    def gated(update, batch) -> None:  # type: ignore[no-untyped-def]
        assert gate.wait(30)
        real(update, batch)

    monkeypatch.setattr(tally_module, "_update", gated)
    taken = []
    ahead = threading.Event()

    def store(chunks) -> None:  # type: ignore[no-untyped-def]
        for chunk in chunks:
            taken.append(chunk)
            if len(taken) == 3:
                ahead.set()

    with ThreadPoolExecutor(1) as pool, Tally() as tally:
        writing = pool.submit(store, tally.over([b"x"] * 10))
        assert ahead.wait(30)
        time.sleep(0.05)  # enough to run away, were it not held
        assert len(taken) <= 4
        assert not writing.done()
        gate.set()
        writing.result(30)
        record, _sha256 = tally.result("f")
    assert len(taken) == record.size == 10
