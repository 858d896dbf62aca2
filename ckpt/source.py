"""Where the bytes of checkpoint tensors are read from: a committed step, or memory.

:class:`TensorSource` is the seam between consolidation and everything that holds tensors: it
gives byte ranges of named files, and records that say which range is which piece of which tensor.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

import torch

from .checksum import block_range, blocks_of, verify_block
from .dtypes import dtype_code
from .errors import DamagedError, StateError
from .manifest import StepManifest
from .storage.base import Buffer, Storage
from .types import BLOCK_BYTES, MODEL_PREFIX, Chunk, FileRecord, TensorRecord

CACHE_BYTES: Final = 256 * 1024 * 1024
"""Default bound on the verified blocks that a :class:`StepSource` keeps."""


@runtime_checkable
class TensorSource(Protocol):
    """Tensors as records plus byte ranges of files."""

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """Every tensor by its checkpoint name (``model.<FQN>``)."""
        ...

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of a file that the records name."""
        ...


class StepSource:
    """A committed step on storage; every byte handed out comes from a block whose CRC32 matched.

    Blocks of 8 MiB are read whole, verified, and kept in a least-recently-used cache: many small
    tensors share a block, and a tensor sharded over N ranks needs one block of each of N files.
    """

    def __init__(
        self,
        storage: Storage,
        directory: str,
        manifest: StepManifest,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._storage = storage
        self._directory = directory
        self._files = {record.name: record for record in manifest.files}
        self._capacity = max(1, cache_bytes // BLOCK_BYTES)
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._records = MappingProxyType({record.name: record for record in manifest.tensors})

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """Every tensor of the step by its checkpoint name."""
        return self._records

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Verified bytes ``[start, end)`` of a file of the step.

        Raises:
            DamagedError: the manifest does not know the file or the range, or the bytes in
                it do not have the CRC32 that the manifest records.
            StorageError: the store failed.
        """
        record = self._files.get(file)
        where = f"{self._storage.url}/{self._directory}/{file}"
        if record is None:
            raise DamagedError(f"{where} is named by a tensor but is no file of the manifest")
        if not 0 <= start <= end <= record.size:
            msg = f"bytes [{start}, {end}) lie outside {where}, which has {record.size}"
            raise DamagedError(msg)
        pieces: list[memoryview] = []
        for index in blocks_of(start, end):
            low, high = block_range(record, index)
            block = memoryview(self._block(record, index))
            pieces.append(block[max(start, low) - low : min(end, high) - low])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)  # none for an empty range

    def _block(self, record: FileRecord, index: int) -> bytes:
        known = self._blocks.get((record.name, index))
        if known is not None:
            self._blocks.move_to_end((record.name, index))
            return known
        path = f"{self._directory}/{record.name}"
        data = self._storage.read(path, *block_range(record, index))
        verify_block(record, index, data, f"{self._storage.url}/{path}")
        while len(self._blocks) >= self._capacity:
            self._blocks.popitem(last=False)
        self._blocks[record.name, index] = data
        return data


class MemorySource:
    """Whole tensors in memory, for adapters that were gathered or are not sharded at all."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take tensors by canonical FQN.

        Args:
            tensors: full (not sharded) tensors; copied to contiguous CPU memory if need be.

        Raises:
            StateError: a DTensor, whose local shard would be taken for the whole.
        """
        self._bytes: dict[str, memoryview] = {}
        records: dict[str, TensorRecord] = {}
        for fqn, tensor in tensors.items():
            if type(tensor).__name__ == "DTensor":
                msg = f"{fqn!r} is a DTensor; gather it (full_tensor()) or export from a checkpoint"
                raise StateError(msg)
            data = _raw_bytes(tensor)
            name = MODEL_PREFIX + fqn
            shape = tuple(tensor.shape)
            self._bytes[name] = data
            chunk = Chunk((0,) * len(shape), shape, name, 0, data.nbytes)
            records[name] = TensorRecord(name, dtype_code(tensor.dtype), shape, (chunk,))
        self._records = MappingProxyType(records)

    @property
    def records(self) -> Mapping[str, TensorRecord]:
        """Every tensor by its checkpoint name; each is its own file of one chunk."""
        return self._records

    def read(self, file: str, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of the tensor with that checkpoint name."""
        return self._bytes[file][start:end]


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    buffer = bytearray(tensor.numel() * tensor.element_size())
    if buffer:
        # The copy goes through a buffer of ours: a memoryview of it needs no NumPy and no unsafe
        # pointer arithmetic, and later changes of the live tensor cannot reach it.
        view = torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
        view.copy_(tensor.detach())
    return memoryview(buffer)
