"""Host memory in the layout of the shard file: a save copies into it, a thread writes it out.

A slot holds the whole file, header included, so writing is a few large system calls on
memory that no Python object has to be built for. Two slots let one save be copied while the
one before it is still being written. Both are allocated once for a layout.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed.tensor import DTensor

from .dtypes import TORCH_DTYPES
from .errors import PlanError, SaveAborted
from .memory import bytes_of
from .plan import Piece
from .shard import ShardLayout
from .storage.posix_write import PAGE

SLOTS = 2


class Slot:
    """One copy of this rank's shard file in host memory.

    Args:
        layout: where each tensor lies in the file.
        pieces: the tensors, in the order in which they will be copied.
        pinned: page-locked memory, for asynchronous copies from a CUDA device.
    """

    def __init__(self, layout: ShardLayout, pieces: Sequence[Piece], *, pinned: bool) -> None:
        room = torch.empty(layout.size + PAGE, dtype=torch.uint8, pin_memory=pinned)
        # From the start of a page, so that a disk can be written to without another copy.
        self._memory = room[-room.data_ptr() % PAGE :][: layout.size]
        # Touch every page now: the first save should not pay for the page faults.
        self._memory.zero_()
        self._header = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        self.write_header()
        self._views = []
        for piece in pieces:
            start, end = layout.offsets[piece.name]
            flat = self._memory[start:end].view(TORCH_DTYPES[piece.dtype])
            self._views.append(flat.view(piece.sizes))
        self._forms = [(view.shape, view.dtype) for view in self._views]
        self._event: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self._memory.numel()

    def write_header(self) -> None:
        """Make the slot begin as the file does; a save writes everything behind that."""
        self._memory[: len(self._header)].copy_(self._header)

    def buffer(self) -> memoryview:
        """The file's bytes; they stay in memory for as long as a view of them lives."""
        return bytes_of(self._memory)

    def fill(self, sources: Sequence[torch.Tensor], stream: torch.cuda.Stream | None) -> None:
        """Copy the local tensors in; on CUDA the copy is only started.

        Args:
            sources: local tensors, in the order of the pieces.
            stream: side stream for the copy from a CUDA device, or None.

        Raises:
            PlanError: a tensor has another shape or dtype than was planned.
        """
        found = [(source.shape, source.dtype) for source in sources]
        if found != self._forms:
            for now, planned in zip(found, self._forms, strict=True):
                if now != planned:
                    msg = (
                        f"a tensor changed after planning: {now[1]} {tuple(now[0])}, "
                        f"planned {planned[1]} {tuple(planned[0])}"
                    )
                    raise PlanError(msg)
        if stream is None:
            torch._foreach_copy_(self._views, list(sources))
            return
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch._foreach_copy_(self._views, list(sources), non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no hints
            self._event.record(stream)

    def order_after_copy(self) -> None:
        """Make the current CUDA stream wait for the copy; the host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def wait_copied(self) -> None:
        """Block until the copy is complete."""
        if self._event is not None:
            self._event.synchronize()


class Arena:
    """The slots of one layout, handed out to saves and given back by the writer thread."""

    def __init__(
        self, layout: ShardLayout | None, pieces: Sequence[Piece], *, pinned: bool
    ) -> None:
        self._condition = threading.Condition()
        self._free: list[Slot | None] = [
            None if layout is None else Slot(layout, pieces, pinned=pinned) for _ in range(SLOTS)
        ]

    def acquire(self, timeout: float) -> Slot | None:
        """A free slot; None stands for the slot of a rank that writes no file.

        Raises:
            SaveAborted: none came free within ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        with self._condition:
            while not self._free:
                left = deadline - time.monotonic()
                if left <= 0 or not self._condition.wait(left):
                    msg = (
                        f"both arena slots were still being written after {timeout:.0f} s; the "
                        "store is stuck or far slower than the rate of saves"
                    )
                    raise SaveAborted(msg)
            return self._free.pop()

    def available(self) -> bool:
        """Whether a slot is free right now."""
        with self._condition:
            return bool(self._free)

    @contextmanager
    def lent(self) -> Iterator[list[memoryview]]:
        """The memory of the free slots, for work that is over before the next save is copied.

        Memory that has been used before costs a small part of what fresh memory does. Nothing of
        what was put there may be used afterwards.
        """
        with self._condition:
            slots = [slot for slot in self._free if slot is not None]
            self._free = [slot for slot in self._free if slot is None]
        try:
            yield [slot.buffer() for slot in slots]
        finally:
            for slot in slots:
                slot.write_header()
                self.release(slot)

    def release(self, slot: Slot | None) -> None:
        """Give a slot back."""
        with self._condition:
            self._free.append(slot)
            self._condition.notify()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, without copying; call under ``no_grad``."""
    # Under no_grad a parameter can be copied from and into as it is; detach() would cost more than
    # everything else that is done for a small tensor.
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
