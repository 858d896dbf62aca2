"""A checkpoint that stock DCP wrote (``FileSystemWriter``): described, checked, read without trust.

Tensors and entries are ranges of ``.distcp`` files, each a ``torch.save`` of one object; they
are loaded in the mode that admits tensors and plain containers alone.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ckpt.coverage import tiling_problem
from ckpt.dtypes import dtype_code
from ckpt.errors import DamagedError, NoCheckpoint, ObjectNotFound, StateError
from ckpt.layout import path_problem
from ckpt.storage import Storage

from .stock_pickle import StockRecord, read_pickle

METADATA: Final = ".metadata"
_GLOBAL: Final = re.compile(r"(?:GLOBAL|Unsupported (?:global|class|type)\S*:?)\s+`?([\w.]+)")
_MAX_INT: Final = 2**63


@dataclass(frozen=True, slots=True)
class Item:
    """Bytes ``[start, start + length)`` of a file: one saved object."""

    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class StockChunk:
    """One piece of a tensor and where it was saved."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item


@dataclass(frozen=True, slots=True)
class StockTensor:
    """A whole tensor: safetensors dtype code, global shape, and chunks that cover it once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StockChunk, ...]


class StockCheckpoint:
    """What a directory of stock DCP holds.

    Attributes:
        tensors: by name.
        entries: everything else, by name.
        paths: where a name lies in the nested state dict; empty if the planner kept none.

    Args:
        storage: the checkpoint's directory.

    Raises:
        NoCheckpoint: there is no ``.metadata``.
        StateError: it names what it should not, or holds what cannot be converted.
        DamagedError: it is malformed.
        StorageError: the store failed.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        where = f"{storage.url}/{METADATA}"
        try:
            data = storage.read(METADATA)
        except ObjectNotFound as error:
            msg = f"{storage.url} is not a DCP checkpoint: no {METADATA} in it"
            raise NoCheckpoint(msg) from error
        root = _record(read_pickle(data, where), "Metadata", where)
        items = _items(root.get("storage_data"), where)
        self.tensors: dict[str, StockTensor] = {}
        self.entries: dict[str, Item] = {}
        for name, value in _mapping(root.get("state_dict_metadata"), "its names", where).items():
            if isinstance(value, StockRecord) and value.kind == "TensorStorageMetadata":
                self.tensors[name] = _tensor(name, value, items, where)
            else:
                _record(value, "BytesStorageMetadata", where)
                self.entries[name] = _item_of(items, name, None, where)
        self.paths = _paths(root.get("planner_data"))

    @property
    def url(self) -> str:
        """Where it lies."""
        return self._storage.url

    def read_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor, put together on the host.

        Raises:
            StateError: what was saved is not a tensor.
            DamagedError: it is not the one that the metadata describes.
        """
        tensor = self.tensors[name]
        result: torch.Tensor | None = None
        for chunk in tensor.chunks:
            piece = self._load(name, chunk.item)
            if not isinstance(piece, torch.Tensor):
                msg = f"{self.url}: {name} is a {type(piece).__name__}, the metadata says tensor"
                raise StateError(msg)
            found = (dtype_code(piece.dtype), tuple(piece.shape), piece.layout)
            if found != (tensor.dtype, chunk.sizes, torch.strided):
                msg = (
                    f"{self.url}: {name} at {list(chunk.offsets)} is {found[0]} {list(found[1])}, "
                    f"the metadata says {tensor.dtype} {list(chunk.sizes)}"
                )
                raise DamagedError(msg)
            if chunk.sizes == tensor.shape:
                return piece.detach().contiguous()
            if result is None:
                result = torch.empty(tensor.shape, dtype=piece.dtype)
            place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            result[place] = piece.detach()
        if result is None:  # callers ask for tensors with elements only
            msg = f"{self.url}: {name} has no chunks"
            raise DamagedError(msg)
        return result

    def read_entry(self, name: str) -> Any:
        """A non-tensor entry.

        Raises:
            StateError: it holds anything but plain data; names what.
            DamagedError: its bytes cannot be read.
        """
        return self._load(name, self.entries[name])

    def _load(self, name: str, item: Item) -> Any:
        try:
            data = self._storage.read(item.file, item.start, item.start + item.length)
        except ObjectNotFound as error:
            raise DamagedError(str(error)) from error
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            text = str(error)
            named = _GLOBAL.search(text)
            if named is not None:
                msg = (
                    f"{self.url}: {name!r} holds a {named[1]}, which is not plain data; it was not "
                    f"loaded. Leave it out with --skip {name}"
                )
                raise StateError(msg) from error
            msg = (
                f"{self.url}: {name!r} in {item.file} cannot be read: {text.partition(chr(10))[0]}"
            )
            raise DamagedError(msg) from error


def _fail(where: str, what: str) -> DamagedError:
    return DamagedError(f"{where}: {what}")


def _record(value: Any, kind: str, where: str) -> StockRecord:
    if not isinstance(value, StockRecord) or value.kind != kind:
        raise _fail(where, f"has a {type(value).__name__} where a {kind} belongs")
    return value


def _mapping(value: Any, what: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _fail(where, f"{what} are not a dictionary of texts")
    return value


def _counts(value: Any, what: str, where: str) -> tuple[int, ...]:
    good = isinstance(value, tuple) and all(
        type(number) is int and 0 <= number < _MAX_INT for number in value
    )
    if not good:
        raise _fail(where, f"{what} is not a list of sizes: {value!r:.100}")
    return tuple(value)


def _items(value: Any, where: str) -> dict[tuple[str, tuple[int, ...] | None], Item]:
    """Where everything was saved, by (name, offsets)."""
    if not isinstance(value, dict):
        raise _fail(where, "lists no saved items")
    items = {}
    for key, info in value.items():
        index, record = _record(key, "MetadataIndex", where), _record(info, "_StorageInfo", where)
        name, offset = index.get("fqn"), index.get("offset")
        if not isinstance(name, str):
            raise _fail(where, f"an item has the name {name!r:.100}")
        file = record.get("relative_path")
        problem = path_problem(file) if isinstance(file, str) else "is not text"
        if problem:
            raise _fail(where, f"{name}: the file {file!r:.200} {problem}")
        if record.get("transform_descriptors"):
            msg = (
                f"{where}: {name} was written through a stream extension, which is not undone here"
            )
            raise StateError(msg)
        place = _counts((record.get("offset"), record.get("length")), f"{name}'s place", where)
        offsets = None if offset is None else _counts(offset, f"{name}'s offset", where)
        items[name, offsets] = Item(str(file), *place)
    return items


def _item_of(
    items: Mapping[tuple[str, tuple[int, ...] | None], Item],
    name: str,
    offsets: tuple[int, ...] | None,
    where: str,
) -> Item:
    item = items.get((name, offsets))
    if item is None:
        at = "" if offsets is None else f" at {list(offsets)}"
        raise _fail(where, f"does not say where {name}{at} was saved")
    return item


def _tensor(
    name: str,
    value: StockRecord,
    items: Mapping[tuple[str, tuple[int, ...] | None], Item],
    where: str,
) -> StockTensor:
    properties = _record(value.get("properties"), "TensorProperties", where)
    state = getattr(properties, "state", None)
    dtype = state[0] if isinstance(state, tuple) and state else properties.get("dtype")
    if not isinstance(dtype, torch.dtype):
        raise _fail(where, f"{name}: the dtype is {dtype!r:.100}")
    try:
        code = dtype_code(dtype)
    except StateError as error:
        raise StateError(f"{where}: {name}: {error}") from None
    shape = _counts(value.get("size"), f"{name}'s shape", where)
    listed = value.get("chunks")
    if not isinstance(listed, list):
        raise _fail(where, f"{name} has no list of chunks")
    chunks = []
    for entry in listed:
        chunk = _record(entry, "ChunkStorageMetadata", where)
        offsets = _counts(chunk.get("offsets"), f"{name}'s chunk", where)
        sizes = _counts(chunk.get("sizes"), f"{name}'s chunk", where)
        if 0 not in sizes:
            chunks.append(StockChunk(offsets, sizes, _item_of(items, name, offsets, where)))
    problem = tiling_problem(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks])
    if problem:
        raise _fail(where, f"{name}: {problem}")
    return StockTensor(code, shape, tuple(chunks))


def _paths(value: Any) -> dict[str, tuple[str | int, ...]]:
    """Paths in the nested state dict; a planner that is not DCP's own may keep anything."""
    if not isinstance(value, dict):
        return {}
    return {
        name: path
        for name, path in value.items()
        if isinstance(name, str)
        and isinstance(path, tuple)
        and path
        and all(type(step) in (str, int) for step in path)
    }
