"""Sharded checkpoint tensors to one PEFT file, streamed, without a model.

:mod:`ckpt.adapter_plan` says what the file will be. Streaming then reads byte ranges of the
shards and yields the file from front to back, so the result depends on the values alone and
never on how many ranks wrote them.

Memory: one piece of at most :data:`PIECE_BYTES` (or one row, if it is larger, of a tensor that has
to be put together), before and after conversion, and what the source caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from .adapter_plan import AdapterPlan, plan_adapter
from .adapter_runs import Run, runs
from .catalog import find_step
from .dtypes import TORCH_DTYPES
from .errors import DamagedError, NoCheckpoint, NonFiniteError
from .memory import bytes_of
from .peft import WeightsFile, WrittenAdapter, local_directory, write_adapter_dir
from .peft_config import EXPORT_DTYPES
from .planned import PlannedStack, PlannedTensor
from .source import CACHE_BYTES, MemorySource, StepSource, TensorSource
from .storage import open_storage
from .types import AdapterExport, Chunk, ExpertForm, TensorRule

PIECE_BYTES: Final = 4 * 1024 * 1024
"""Largest block that is converted at once, unless a single row is larger. It stays in a processor's
cache from the check of its values until it is written and summed up."""


def stream_adapter(plan: AdapterPlan, source: TensorSource) -> Iterator[memoryview]:
    """Yield the planned file from its first byte to its last.

    Values are scaled in fp32 and then cast, rounding to nearest even.

    Args:
        plan: from :func:`plan_adapter`, over this source's records.
        source: where the chunks' bytes are read.

    Yields:
        Buffers of ``plan.size`` bytes in all; some are the source's own memory, so they hold
        these bytes for as long as the source does.

    Raises:
        NonFiniteError: a value is NaN or infinite, or becomes so in the dtype asked for.
        DamagedError: bytes that do not verify.
        StorageError: the store failed.
    """
    yield memoryview(plan.header)
    dtype, _ = EXPORT_DTYPES[plan.dtype]
    for part in runs(plan.tensors):
        if isinstance(part, Run):
            yield from _stream_run(part, source, dtype)
        elif isinstance(part, PlannedStack):
            yield from _stream_stack(part, source, dtype)
        else:
            yield from _stream_rows(part, source, dtype)


def _stream_run(run: Run, source: TensorSource, dtype: torch.dtype) -> Iterator[memoryview]:
    """Pieces of a run: the source's own memory where nothing changes."""
    size, stays = run.stored.itemsize, run.stays(dtype)
    step = max(1, PIECE_BYTES // max(size, dtype.itemsize))
    origin = run.chunk.start
    for low in range(0, run.elements, step):
        high = min(low + step, run.elements)
        data = _read_exactly(source, run.chunk, origin + low * size, origin + high * size)
        values = torch.frombuffer(data, dtype=run.stored)
        out = values if stays else torch.empty(high - low, dtype=dtype)
        if not stays:
            for tensor, place in run.parts(low, high):
                out[place].copy_(_scaled(values[place], tensor.rule))
        if not _is_finite(out):
            for tensor, place in run.parts(low, high):
                _refuse_non_finite(out[place], _scaled(values[place], tensor.rule), tensor.rule)
        yield data if stays else bytes_of(out)


def _scaled(values: torch.Tensor, rule: TensorRule) -> torch.Tensor:
    return values if rule.scale == 1.0 else values.float() * rule.scale


def _stream_rows(
    tensor: PlannedTensor, source: TensorSource, dtype: torch.dtype
) -> Iterator[memoryview]:
    """Pieces of a tensor that has to be put together."""
    rows = tensor.shape[0]
    step = max(1, PIECE_BYTES // (4 * math.prod(tensor.shape[1:])))
    for first in range(0, rows, step):
        block = _scaled_rows(tensor, first, min(first + step, rows), source)
        yield _encode(block, dtype, tensor.rule)


def _stream_stack(
    stack: PlannedStack, source: TensorSource, dtype: torch.dtype
) -> Iterator[memoryview]:
    """One tensor for all experts of a layer: one expert, or a few rows of all, at a time."""
    if stack.side == "A":
        for parts in stack.parts:
            block = torch.zeros((stack.width, stack.shape[1]), dtype=torch.float32)
            row = 0
            for part in parts:
                end = row + part.shape[0]
                block[row:end] = _scaled_rows(part, 0, part.shape[0], source)
                row = end
            yield _encode(block, dtype, parts[0].rule)
        return
    rank = 0
    for place, part in enumerate(stack.parts[0]):
        step = max(1, PIECE_BYTES // (4 * stack.shape[1]))
        for first in range(0, part.shape[0], step):
            last = min(first + step, part.shape[0])
            rows = torch.zeros((last - first, stack.width, len(stack.parts)), dtype=torch.float32)
            for expert, parts in enumerate(stack.parts):
                values = _scaled_rows(parts[place], first, last, source)
                rows[:, rank : rank + values.shape[1], expert] = values
            yield _encode(rows, dtype, part.rule)
        rank += part.shape[1]


def _scaled_rows(
    tensor: PlannedTensor, first: int, last: int, source: TensorSource
) -> torch.Tensor:
    block = _read_rows(tensor, first, last, source)
    if tensor.rule.scale != 1.0:
        block.mul_(tensor.rule.scale)
    return block


def _encode(block: torch.Tensor, dtype: torch.dtype, rule: TensorRule) -> memoryview:
    out = block.view(-1).to(dtype)
    _refuse_non_finite(out, block, rule)
    return bytes_of(out)


def _read_rows(tensor: PlannedTensor, first: int, last: int, source: TensorSource) -> torch.Tensor:
    """Rows ``[first, last)`` of the final tensor in fp32, zero where it is padded."""
    dtype = TORCH_DTYPES[tensor.record.dtype]
    block = torch.zeros((last - first, *tensor.shape[1:]), dtype=torch.float32)
    for chunk in tensor.record.chunks:
        origin, offsets, sizes = chunk.start, chunk.offsets, chunk.sizes
        if tensor.rule.index is not None:
            slab = tensor.rule.index - offsets[0]
            if not 0 <= slab < sizes[0]:
                continue
            offsets, sizes = offsets[1:], sizes[1:]
            origin += slab * math.prod(sizes) * dtype.itemsize
        low, high = max(first, offsets[0]), min(last, offsets[0] + sizes[0])
        if low >= high or 0 in sizes:
            continue
        # Chunks are row-major, so any run of their rows is one run of bytes.
        row_bytes = math.prod(sizes[1:]) * dtype.itemsize
        start = origin + (low - offsets[0]) * row_bytes
        data = _read_exactly(source, chunk, start, start + (high - low) * row_bytes)
        target = (
            slice(low - first, high - first),
            *(
                slice(offset, offset + size)
                for offset, size in zip(offsets[1:], sizes[1:], strict=True)
            ),
        )
        block[target].copy_(torch.frombuffer(data, dtype=dtype).view(high - low, *sizes[1:]))
    return block


def _read_exactly(source: TensorSource, chunk: Chunk, start: int, end: int) -> memoryview:
    data = memoryview(source.read(chunk.file, start, end))
    if len(data) != end - start:
        msg = f"{chunk.file!r} gave {len(data)} bytes for [{start}, {end}), want {end - start}"
        raise DamagedError(msg)
    # torch wants writable memory even where it only reads.
    return memoryview(bytearray(data)) if data.readonly else data


def _is_finite(values: torch.Tensor) -> bool:
    # The extremes carry NaN and infinity along, at a small part of an element-wise test's cost.
    return all(math.isfinite(extreme.item()) for extreme in torch.aminmax(values))


def _refuse_non_finite(out: torch.Tensor, block: torch.Tensor, rule: TensorRule) -> None:
    """Refuse values ``out``, made from ``block``, that no engine may be given.

    Raises:
        NonFiniteError: says whether the values or the dtype are at fault.
    """
    if _is_finite(out):
        return
    name = f"{rule.key!r} (from {rule.source!r})"
    if bool(torch.isfinite(block).all()):
        largest = torch.finfo(out.dtype).max
        msg = f"{name} does not fit {out.dtype}: the largest is {largest:g}; export as float32"
    else:
        bad = int((~torch.isfinite(block)).sum())
        msg = f"{name} holds {bad} NaN or infinite value(s); nothing was written"
    raise NonFiniteError(msg)


@dataclass(frozen=True, slots=True)
class Consolidated:
    """What :func:`consolidate` did: which step of which writer it took, and what it wrote."""

    step: int
    epoch: int
    written: WrittenAdapter


def consolidate(
    url: str | Path,
    step: int | None,
    out: str | Path,
    *,
    epoch: int | None = None,
    dtype: str = "bfloat16",
    experts: ExpertForm | None = None,
    overwrite: bool = False,
    cache_bytes: int = CACHE_BYTES,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
    on_bytes: Callable[[int, int], object] | None = None,
) -> Consolidated:
    """Write the PEFT adapter directory of a committed step, without a model.

    Args:
        url: the run's root, local or remote.
        step: step number, or None for the newest whole one.
        out: the directory to make, local or remote; readers see all of it or nothing.
        epoch: the writer's epoch, to take an abandoned step.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        experts: form of the adapters on experts; by default the one that the trainer chose.
        overwrite: replace an adapter that is at ``out`` already.
        cache_bytes: bound on the blocks that are kept in memory once verified; one is kept always.
        storage_options: for the root's store.
        out_storage_options: for the store of ``out``; for a remote one those of the root by
            default.
        on_bytes: is told of every piece of the weights that was made: its bytes, and how many
            there are in all.

    Raises:
        NoCheckpoint: no such step, or it carries no adapter export.
        DamagedError: bytes that do not verify.
        NonFiniteError: a value that is NaN or infinite.
        StateError, ConfigError: the export does not fit the step.
        AlreadyExists: something is at ``out``.
        StorageError: a store failed.
    """
    storage = open_storage(str(url), storage_options)
    entry = find_step(storage, step, epoch=epoch)
    manifest = entry.manifest
    if manifest is None or manifest.export is None:
        msg = (
            f"step {entry.step} of {storage.url} has no adapter export, so it cannot be written "
            "as a PEFT adapter; save it from a model with LoRA applied"
        )
        raise NoCheckpoint(msg)
    source = StepSource(storage, entry.path, manifest, cache_bytes=cache_bytes)
    export = manifest.export
    if experts is not None:
        export = replace(export, experts=experts)
    plan = plan_adapter(export, source.records, dtype)
    pieces = stream_adapter(plan, source)
    if on_bytes is not None:
        pieces = _counted(pieces, plan.size, on_bytes)
    options = out_storage_options
    if options is None and local_directory(out) is None:
        options = storage_options
    written = write_adapter_dir(
        out,
        WeightsFile(plan.size, pieces),
        plan.peft_config,
        overwrite=overwrite,
        storage_options=options,
    )
    return Consolidated(entry.step, entry.epoch, written)


def _counted(
    pieces: Iterator[memoryview], total: int, on_bytes: Callable[[int, int], object]
) -> Iterator[memoryview]:
    for piece in pieces:
        count = piece.nbytes
        yield piece
        on_bytes(count, total)


def export_tensors(
    tensors: Mapping[str, torch.Tensor],
    export: AdapterExport,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> WrittenAdapter:
    """Write gathered tensors as a PEFT adapter directory; the bytes equal :func:`consolidate`'s.

    Args:
        tensors: full tensors by canonical FQN.
        export: PEFT configuration and rules.
        out: the directory to make, local or remote.
        dtype: as in :func:`consolidate`.
        overwrite: as in :func:`consolidate`.
        storage_options: for the store of ``out``.

    Raises:
        StateError, ConfigError, NonFiniteError, AlreadyExists, StorageError: as there.
    """
    source = MemorySource(tensors)
    plan = plan_adapter(export, source.records, dtype)
    return write_adapter_dir(
        out,
        WeightsFile(plan.size, stream_adapter(plan, source)),
        plan.peft_config,
        overwrite=overwrite,
        storage_options=storage_options,
    )
