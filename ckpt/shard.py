"""The shard file: a valid safetensors file whose layout is known before a byte is copied.

::

    8 bytes   little-endian length of the header
    header    JSON: name → {dtype, shape, data_offsets}, and ``__metadata__``; padded with spaces
    data      the tensors, back to back, row-major, little-endian

``__metadata__`` carries ``DCP_SHARDING_INFO``, with which
``torch.distributed.checkpoint.HuggingFaceStorageReader`` puts the pieces of several shards
together. The data begins at a multiple of 64. The format allows no holes between tensors, so
those whose size is a multiple of 64 come first (each is then aligned to 64), and the rest
follows by falling element size (each is then aligned to its element).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

from .dtypes import item_bytes
from .errors import DamagedError, PlanError

ALIGNMENT = 64
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

_METADATA = "__metadata__"
_SHARDING = "DCP_SHARDING_INFO"
_MAX_DIMS = 64


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """One piece of a tensor that a rank writes.

    Attributes:
        name: checkpoint name.
        dtype: safetensors code.
        shape: the piece's own shape.
        global_shape: shape of the whole tensor.
        offsets: where the piece lies in it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the piece in bytes (0 for an unknown dtype)."""
        return prod(self.shape) * (item_bytes(self.dtype) or 0)


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where everything lies in a shard file.

    Attributes:
        header: the first bytes of the file, length field and padding included.
        offsets: name → [start, end) in the file, in file order.
        size: size of the file.
    """

    header: bytes
    offsets: Mapping[str, tuple[int, int]]
    size: int

    @classmethod
    def build(cls, tensors: Sequence[ShardTensor]) -> ShardLayout:
        """Lay the pieces out; equal input gives equal bytes. Empty pieces are not stored.

        Raises:
            PlanError: a name twice, an unknown dtype, a piece that leaves its tensor, or a header
                above the format's limit; names the tensor.
        """
        for tensor in tensors:
            _check(tensor)
        stored = [tensor for tensor in tensors if tensor.nbytes]
        aligned = [tensor for tensor in stored if tensor.nbytes % ALIGNMENT == 0]
        rest = [tensor for tensor in stored if tensor.nbytes % ALIGNMENT]
        rest.sort(key=lambda tensor: -(item_bytes(tensor.dtype) or 0))

        entries: dict[str, Any] = {}
        position = 0
        for tensor in (*aligned, *rest):
            if tensor.name in entries:
                msg = (
                    f"two pieces of {tensor.name} on one rank, but a shard holds one piece of a "
                    "tensor; use a placement that gives each rank one contiguous block"
                )
                raise PlanError(msg)
            end = position + tensor.nbytes
            entries[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        sharding = {
            tensor.name: {"saved_offsets": list(tensor.offsets)} for tensor in (*aligned, *rest)
        }
        metadata = {_SHARDING: json.dumps(sharding, separators=(",", ":")), "format": "pt"}
        header = _encode_header({_METADATA: metadata, **entries})
        base = len(header)
        offsets = {
            name: (base + entry["data_offsets"][0], base + entry["data_offsets"][1])
            for name, entry in entries.items()
        }
        return cls(header=header, offsets=MappingProxyType(offsets), size=base + position)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value: a mapping proxy cannot be sent to another process."""
        return _rebuild, (self.header, dict(self.offsets), self.size)


def _rebuild(header: bytes, offsets: dict[str, tuple[int, int]], size: int) -> ShardLayout:
    return ShardLayout(header=header, offsets=MappingProxyType(offsets), size=size)


def _check(tensor: ShardTensor) -> None:
    if tensor.name == _METADATA or not tensor.name:
        msg = f"a tensor cannot be named {tensor.name!r}"
        raise PlanError(msg)
    if item_bytes(tensor.dtype) is None:
        msg = f"{tensor.name}: {tensor.dtype!r} is not a safetensors dtype code"
        raise PlanError(msg)
    rank = len(tensor.global_shape)
    inside = len(tensor.shape) == len(tensor.offsets) == rank and all(
        min(offset, size) >= 0 and offset + size <= extent
        for offset, size, extent in zip(
            tensor.offsets, tensor.shape, tensor.global_shape, strict=True
        )
    )
    if not inside or rank > _MAX_DIMS:
        msg = (
            f"{tensor.name}: a piece of shape {list(tensor.shape)} at {list(tensor.offsets)} does "
            f"not lie in a tensor of shape {list(tensor.global_shape)}"
        )
        raise PlanError(msg)


def _encode_header(document: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        msg = f"a tensor's name is not valid Unicode: {error}"
        raise PlanError(msg) from None
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        msg = (
            f"the shard's header would take {len(text)} bytes, the format allows "
            f"{MAX_HEADER_BYTES}; spread the tensors over more ranks"
        )
        raise PlanError(msg)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


class HeaderTensor(NamedTuple):
    """One entry of a shard's header; ``start`` and ``end`` are positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_size(data: bytes, file_size: int, where: str) -> int:
    """Bytes to read for the whole header, from the first 8 bytes of a file.

    Args:
        data: at least the first 8 bytes.
        file_size: size of the file in bytes.
        where: the file's path, for the message.

    Raises:
        DamagedError: the length field cannot be true of a file of this size.
    """
    if len(data) < LENGTH_BYTES:
        _refuse(where, f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - LENGTH_BYTES):
        _refuse(where, f"a header of {length} bytes cannot lie in a file of {file_size} bytes")
    return LENGTH_BYTES + length


def parse_header(data: bytes, file_size: int, where: str) -> dict[str, HeaderTensor]:
    """The tensors of a safetensors file, in file order; safe on arbitrary bytes.

    Args:
        data: the file's first bytes, the header at least.
        file_size: size of the whole file in bytes.
        where: the file's path, for the message.

    Raises:
        DamagedError: anything that is not a complete, exact description of such a file.
    """
    base = header_size(data, file_size, where)
    if len(data) < base:
        _refuse(where, f"the header has {base} bytes, only {len(data)} were read")
    try:
        pairs = json.loads(data[LENGTH_BYTES:base].decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        _refuse(where, f"the header is not JSON: {str(error)[:200]}")
    if not isinstance(pairs, dict):
        _refuse(where, "the header is not a JSON object")
    metadata = pairs.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _refuse(where, "the header's metadata is not an object of texts")
    entries = sorted(
        ((name, _parse_entry(name, entry, base, where)) for name, entry in pairs.items()),
        key=lambda item: (item[1].start, item[1].end),
    )
    position = base
    for name, entry in entries:
        if entry.start != position:
            _refuse(where, f"{name} begins at byte {entry.start}, not at {position}")
        position = entry.end
    if position != file_size:
        _refuse(where, f"the tensors end at byte {position}, the file has {file_size}")
    return dict(entries)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        msg = "a member appears twice"
        raise ValueError(msg)
    return members


def _parse_entry(name: str, entry: Any, base: int, where: str) -> HeaderTensor:
    shown = name[:200]
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(where, f"{shown}: an entry needs dtype, shape and data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    width = item_bytes(code) if isinstance(code, str) else None
    if width is None:
        _refuse(where, f"{shown}: unknown dtype {str(code)[:40]!r}")
    if not _counts(shape) or len(shape) > _MAX_DIMS:
        _refuse(where, f"{shown}: the shape is not a list of sizes")
    if not _counts(span) or len(span) != 2:
        _refuse(where, f"{shown}: data_offsets are not two positions")
    if span[1] - span[0] != prod(shape) * width:
        _refuse(
            where,
            f"{shown}: {span[1] - span[0]} bytes do not hold a {code} tensor of shape "
            f"{str(shape)[:100]}",
        )
    return HeaderTensor(code, tuple(shape), base + span[0], base + span[1])


def _counts(value: Any) -> bool:
    """Whether the value is a list of integers that fit 63 bits."""
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63 for item in value
    )


def _refuse(where: str, reason: str) -> NoReturn:
    msg = f"{where}: {reason}"
    raise DamagedError(msg)
