"""What is different between two steps, two versions, or a version and a bare PEFT adapter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Protocol

import torch

from .adapter_file import AdapterFile
from .dtypes import TORCH_DTYPES, item_bytes
from .errors import ConfigError
from .manifest import StepManifest
from .source import StepSource
from .storage import Storage
from .types import TensorRecord

BATCH_BYTES: Final = 64 * 1024 * 1024
"""Tensors that are read and compared at a time; one that is larger is read alone."""


class Kind(StrEnum):
    """How a tensor differs."""

    only_first = "only in the first"
    only_second = "only in the second"
    dtype = "another dtype"
    shape = "another shape"
    values = "other values"
    bits = "other bits"


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that is not the same on both sides.

    Attributes:
        name: checkpoint name or PEFT key.
        kind: what differs. ``bits`` are values that compare equal but are written differently
            (a negative zero, another NaN).
        first: dtype and shape on the first side, or None.
        second: the same of the second.
        largest: greatest absolute difference of an element, where shapes agree.
        relative: Frobenius norm of the difference by that of the first, where shapes agree;
            infinite where the first is zero.
    """

    name: str
    kind: Kind
    first: str | None
    second: str | None
    largest: float | None = None
    relative: float | None = None


class Side(Protocol):
    """What is compared: tensors by name."""

    @property
    def tensors(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Dtype code and shape by name."""
        ...

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Whole tensors, verified, on the CPU.

        Raises:
            DamagedError: bytes that do not verify.
            StorageError: the store failed.
        """
        ...


class StepSide:
    """The tensors of a committed step, put together from all ranks' shards."""

    def __init__(self, storage: Storage, path: str, manifest: StepManifest) -> None:
        self._source = StepSource(storage, path, manifest)
        self.tensors = {one.name: (one.dtype, one.shape) for one in manifest.tensors}

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Whole tensors; blocks that hold several are read once."""
        return [self._whole(self._source.records[name]) for name in names]

    def _whole(self, record: TensorRecord) -> torch.Tensor:
        whole = torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype])
        for chunk in record.chunks:
            data = bytearray(self._source.read(chunk.file, chunk.start, chunk.end))
            if not data:
                continue
            part = torch.frombuffer(data, dtype=whole.dtype).view(chunk.sizes)
            place = zip(chunk.offsets, chunk.sizes, strict=True)
            whole[tuple(slice(offset, offset + size) for offset, size in place)] = part
        return whole


class AdapterSide:
    """The tensors of a published version or of a PEFT directory."""

    def __init__(self, adapter: AdapterFile) -> None:
        self._adapter = adapter
        self.tensors = {key: (one.dtype, one.shape) for key, one in adapter.tensors.items()}

    @property
    def config(self) -> Mapping[str, Any]:
        """Content of ``adapter_config.json``."""
        return self._adapter.config

    def read(self, names: Sequence[str]) -> list[torch.Tensor]:
        """Whole tensors."""
        places = [self._adapter.tensors[name] for name in names]
        parts = self._adapter.read([(place.start, place.end) for place in places])
        whole = []
        for place, part in zip(places, parts, strict=True):
            dtype = TORCH_DTYPES[place.dtype]
            flat = (
                torch.frombuffer(part, dtype=dtype) if part.nbytes else torch.empty(0, dtype=dtype)
            )
            whole.append(flat.view(place.shape))
        return whole


def compare(first: Side, second: Side) -> Iterator[TensorDifference]:
    """Every tensor that is not the same on both sides, as they are found.

    Args:
        first: one side.
        second: the other, of the same kind: names of steps and of adapters are not alike.

    Yields:
        The differences; none if the tensors are equal to the last bit.

    Raises:
        ConfigError: no name is on both sides.
        DamagedError: bytes that do not verify.
        StorageError: a store failed.
    """
    here, there = first.tensors, second.tensors
    both = [name for name in here if name in there]
    if not both and here and there:
        one, other = next(iter(here)), next(iter(there))
        msg = (
            f"no tensor is on both sides (the first has {one!r}, the second {other!r}); compare "
            "two steps of one model, or two adapters"
        )
        raise ConfigError(msg)
    for name in here:
        if name not in there:
            yield TensorDifference(name, Kind.only_first, _said(here[name]), None)
    for name in there:
        if name not in here:
            yield TensorDifference(name, Kind.only_second, None, _said(there[name]))
    for batch in _batches(both, here):
        for name, a, b in zip(batch, first.read(batch), second.read(batch), strict=True):
            found = _difference(name, a, b, _said(here[name]), _said(there[name]))
            if found is not None:
                yield found


def fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Entries of two configurations that are not the same; None for one that is missing."""
    names = sorted({*first, *second})
    pairs = {name: (first.get(name), second.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _batches(
    names: Sequence[str], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for name in names:
        dtype, shape = tensors[name]
        needed = math.prod(shape) * (item_bytes(dtype) or 1)
        if batch and size + needed > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(name)
        size += needed
    if batch:
        yield batch


def _difference(
    name: str, a: torch.Tensor, b: torch.Tensor, first: str, second: str
) -> TensorDifference | None:
    if a.shape != b.shape:
        return TensorDifference(name, Kind.shape, first, second)
    same_dtype = a.dtype == b.dtype
    if same_dtype and torch.equal(_bits(a), _bits(b)):
        return None
    # In fp64, in which every value of the narrower kinds and their differences are exact.
    wide, other = a.double(), b.double()
    apart = wide - other
    largest = float(apart.abs().max()) if apart.numel() else 0.0
    norm = float(wide.norm())
    distance = float(apart.norm())
    relative = distance / norm if norm else (math.inf if distance else 0.0)
    if not same_dtype:
        return TensorDifference(name, Kind.dtype, first, second, largest, relative)
    kind = Kind.bits if torch.equal(wide.nan_to_num(), other.nan_to_num()) else Kind.values
    return TensorDifference(name, kind, first, second, largest, relative)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor


def _said(tensor: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = tensor
    return f"{dtype} {list(shape)}"
