"""One rank's part of a DCP save: its shard file, and the non-tensor entries it was given."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from ckpt.commit import Place, place
from ckpt.dtypes import dtype_code
from ckpt.errors import DamagedError, PlanError, StateError
from ckpt.layout import shard_name
from ckpt.plan import Piece, shard_layout
from ckpt.storage import Storage, put_checked
from ckpt.types import Chunk, FileRecord

from .state_document import encode_entry

STEP = 0
EPOCH = 1
"""Where a checkpoint lies below its id: an id has one step and one writer."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the coordinator gives each rank with its plan.

    Attributes:
        url: the checkpoint id, which must be the rank's own.
        attempt: id of this try, the same on every rank.
        rank: the rank's number in the group.
        world: size of the group.
    """

    url: str
    attempt: str
    rank: int
    world: int


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank reports of one item: a chunk in its file, or an encoded value."""

    attempt: str
    file: FileRecord | None = None
    chunk: Chunk | None = None
    value: bytes | None = None


def place_of(storage: Storage, ticket: Ticket) -> Place:
    """Where the files of a try are written."""
    return place(storage, STEP, EPOCH, ticket.attempt)


def code_of(item: WriteItem) -> str:
    """The dtype code of a planned tensor.

    Raises:
        StateError: the format has none for it; names the tensor.
    """
    data = item.tensor_data
    if data is None:
        msg = f"{item.index.fqn}: the plan does not describe the tensor"
        raise PlanError(msg)
    try:
        return dtype_code(data.properties.dtype)
    except StateError as error:
        msg = f"{item.index.fqn} cannot be saved: {error}"
        raise StateError(msg) from None


def _piece(item: WriteItem) -> Piece:
    code, data = code_of(item), item.tensor_data
    assert data is not None  # noqa: S101 - code_of() has refused it
    return Piece(
        item.index.fqn,
        code,
        tuple(data.size),
        tuple(data.chunk.offsets),
        tuple(data.chunk.sizes),
        item.type is WriteItemType.SHARD,
    )


def encode_item(item: WriteItem, planner: SavePlanner) -> bytes:
    """A non-tensor entry as JSON, from the object itself where the planner gives it.

    Raises:
        StateError: a value that cannot be stored; names the entry.
    """
    name = item.index.fqn
    if (
        isinstance(planner, DefaultSavePlanner)
        and type(planner).transform_object is DefaultSavePlanner.transform_object
        and type(planner).resolve_data is DefaultSavePlanner.resolve_data
    ):
        return encode_entry(name, planner.lookup_object(item.index))
    data = planner.resolve_data(item)
    if isinstance(data, torch.Tensor):
        return encode_entry(name, data)
    # What a planner of another kind gives is a torch.save of the object, made a moment ago in
    # this process; it is read back in the mode that runs no code, for its value alone.
    data.seek(0)
    try:
        value = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).partition("\n")[0]
        msg = f"entry {name!r} of the state dict cannot be saved: {first}"
        raise StateError(msg) from error
    return encode_entry(name, value)


def write_shard(
    storage: Storage, ticket: Ticket, items: Sequence[WriteItem], planner: SavePlanner
) -> list[WriteResult]:
    """Write the tensors among the items as one file, straight from their memory.

    Raises:
        StateError: a tensor that is not dense.
        PlanError: one that is not what was planned, or two pieces of one tensor on this rank.
        StorageError: the store failed.
    """
    held = {}
    for item in items:
        if item.type is not WriteItemType.BYTE_IO and not _piece(item).empty:
            held[item.index.fqn, item.index.offset] = item
    pieces = [_piece(item) for item in held.values()]
    layout = shard_layout(pieces)
    if layout is None:
        return []
    by_name = {item.index.fqn: item for item in held.values()}
    tensors = {name: _host(by_name[name], planner) for name in layout.offsets}
    where = place_of(storage, ticket)
    file = shard_name(ticket.rank, ticket.world)
    buffers = [memoryview(layout.header), *(tensor_bytes(tensor) for tensor in tensors.values())]
    record = put_checked(storage, where.path(file), buffers, name=where.name(file))
    if record.size != layout.size:
        msg = f"{where.path(file)}: {record.size} bytes were written, {layout.size} planned"
        raise DamagedError(msg)
    results = []
    for piece in pieces:
        start, end = layout.offsets[piece.name]
        chunk = Chunk(piece.offsets, piece.sizes, record.name, start, end)
        part = Part(ticket.attempt, record, chunk)
        results.append(result_of(by_name[piece.name], part, end - start))
    return results


def _host(item: WriteItem, planner: SavePlanner) -> torch.Tensor:
    """An item's data, dense and contiguous in host memory."""
    data = planner.resolve_data(item)
    piece = _piece(item)
    if not isinstance(data, torch.Tensor) or data.layout != torch.strided:
        kind = data.layout if isinstance(data, torch.Tensor) else type(data).__name__
        msg = f"{piece.name} cannot be saved: want a dense tensor, got {kind}"
        raise StateError(msg)
    found = (dtype_code(data.dtype), tuple(data.shape))
    if found != (piece.dtype, piece.sizes):
        msg = f"{piece.name} is {found}, planned was {(piece.dtype, piece.sizes)}"
        raise PlanError(msg)
    return data.detach().cpu().resolve_conj().resolve_neg().contiguous()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """A dense, contiguous host tensor's bytes, without a copy."""
    # ctypes instead of Tensor.numpy(): NumPy is not a dependency.
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    # The view holds the array, and so the tensor: a store may keep views for a while.
    array.owner = tensor  # type: ignore[attr-defined]  # ctypes objects take attributes
    return memoryview(array).cast("B")


def result_of(item: WriteItem, part: Part, size: int = 0) -> WriteResult:
    """What DCP gathers of an item."""
    return WriteResult(index=item.index, size_in_bytes=size, storage_data=part)
