"""A snapshot's tensors for a publish: one rank's bytes from memory, the others' from storage."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from .arena import Slot
from .errors import DamagedError
from .storage.base import Buffer
from .types import TensorRecord


class Files(Protocol):
    """Byte ranges of named files."""

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of a file."""
        ...


class PartedFiles:
    """Files of one snapshot of which some lie in another store.

    Args:
        near: where most of them are.
        far: where the others are.
        names: which the others are.
    """

    def __init__(self, near: Files, far: Files, names: Collection[str]) -> None:
        self._near = near
        self._far = far
        self._names = frozenset(names)

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Verified bytes ``[start, end)`` of a file, from where it lies."""
        return (self._far if file in self._names else self._near).read(file, start, end)


class SlotSource:
    """A snapshot's tensors: this rank's bytes from its slot, the others' from storage."""

    def __init__(
        self,
        tensors: Sequence[TensorRecord],
        slot: Slot | None,
        own_file: str | None,
        stored: Files | None,
    ) -> None:
        self._records = {record.name: record for record in tensors}
        self._slot = slot
        self._own_file = own_file
        self._stored = stored

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """Every tensor by its checkpoint name."""
        return self._records

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of a file that the records name.

        Raises:
            DamagedError: no such file, or bytes that do not verify.
        """
        if file == self._own_file and self._slot is not None:
            return self._slot.buffer()[start:end]
        if self._stored is None:
            msg = f"{file} is not part of the snapshot"
            raise DamagedError(msg)
        return self._stored.read(file, start, end)
