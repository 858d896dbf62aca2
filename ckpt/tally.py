"""CRC32 and SHA-256 of a stream, computed beside the thread that writes it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final, Self

from .checksum import Crc32Blocks
from .storage.base import Buffer
from .types import FileRecord

_BATCH_BYTES: Final = 2 * 1024 * 1024
"""Handing over each small tensor would cost more than its sums."""
_BATCHES_AHEAD: Final = 16
"""Batches that wait for their sums: memory stays bounded if these are slower than the store."""


class Tally:
    """The sums of one stream; each has a thread, and they go on while the store syncs or sends.

    Both leave the interpreter free. SHA-256 takes longer than anything else that is done with
    an adapter's bytes, so nothing waits for it but :meth:`result`. Use as a context: behind it no
    thread looks at a chunk any more.
    """

    def __init__(self) -> None:
        self._crc = Crc32Blocks()
        self._sha256 = hashlib.sha256()
        self._threads = [
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"ckpt-{name}")
            for name in ("sha256", "crc")
        ]
        self._pending: deque[Future[None]] = deque()

    def over(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        """The same chunks, summed up on the way; their memory may not change until the end."""
        batch: list[Buffer] = []
        size = 0
        for chunk in chunks:
            batch.append(chunk)
            size += memoryview(chunk).nbytes
            if size >= _BATCH_BYTES:
                self._submit(batch)
                batch, size = [], 0
            yield chunk
        self._submit(batch)

    def result(self, name: str) -> tuple[FileRecord, str]:
        """The record of a file of that name with the stream's bytes, and their SHA-256 in hex."""
        while self._pending:
            self._pending.popleft().result()
        return self._crc.record(name), self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for thread in self._threads:
            thread.shutdown(wait=True, cancel_futures=True)

    def _submit(self, batch: Sequence[Buffer]) -> None:
        sha256, crc = self._threads
        self._pending.append(sha256.submit(_update, self._sha256.update, batch))
        self._pending.append(crc.submit(_update, self._crc.update, batch))
        while len(self._pending) > 2 * _BATCHES_AHEAD:
            self._pending.popleft().result()


def _update(update: Callable[[Buffer], object], batch: Sequence[Buffer]) -> None:
    for chunk in batch:
        update(chunk)
