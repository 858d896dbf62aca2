"""Sharded checkpoint tensors to one PEFT file, streamed, without a model.

The plan is pure: from the export rules and the tensor records follow the file's header, its size
and the order of its tensors. Streaming then reads byte ranges of the shards and yields the
file from front to back, so the result depends on the values alone and never on how
many ranks wrote them.

Memory: one piece of at most :data:`PIECE_BYTES` in fp32 (or one row of a tensor, if a row
is larger), its bytes before and after conversion, and what the source caches.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from .catalog import find_step
from .coverage import tiling_problem
from .dtypes import TORCH_DTYPES
from .errors import ConfigError, DamagedError, NoCheckpoint, NonFiniteError, StateError
from .peft import WeightsFile, WrittenAdapter, local_directory, write_adapter_dir
from .peft_config import EXPORT_DTYPES, check_export, rank_of, split_key
from .source import MemorySource, StepSource, TensorSource
from .storage import open_storage
from .types import MODEL_PREFIX, AdapterExport, Chunk, TensorRecord, TensorRule

PIECE_BYTES: Final = 4 * 1024 * 1024
"""Largest fp32 block that is converted at once, unless a single row is larger."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One PEFT tensor: the rule, the checkpoint tensor it is made from, and its final shape."""

    rule: TensorRule
    record: TensorRecord
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The file that will be written, known before a byte of a tensor is read.

    Attributes:
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        header: length, JSON and padding, up to the first tensor's byte.
        tensors: in file order, which is the sorted order of their PEFT keys.
        size: bytes of the whole file.
    """

    dtype: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]
    size: int


def plan_adapter(
    export: AdapterExport, records: Mapping[str, TensorRecord], dtype: str = "bfloat16"
) -> AdapterPlan:
    """Check an export against the tensors at hand and lay out its safetensors file.

    Args:
        export: the PEFT configuration and the rule of every PEFT tensor.
        records: checkpoint tensors by name; those of the optimizer are ignored.
        dtype: what the tensors are cast to.

    Raises:
        ConfigError: the export or the dtype cannot work.
        StateError: a rule names a tensor that is not there, ranks disagree with the
            configuration, or a trained tensor has no rule and would be lost.
        DamagedError: a tensor's chunks leave a gap, overlap or do not fit their bytes.
    """
    if dtype not in EXPORT_DTYPES:
        wanted = ", ".join(EXPORT_DTYPES)
        raise ConfigError(f"dtype must be one of {wanted}, got {dtype!r}")
    check_export(export)
    planned = tuple(
        _plan_tensor(rule, records) for rule in sorted(export.rules, key=lambda rule: rule.key)
    )
    _check_ranks(planned, export)
    _check_complete(planned, records)
    for record in {tensor.record.name: tensor.record for tensor in planned}.values():
        check_cover(record)
    header, size = _lay_out(planned, dtype)
    return AdapterPlan(dtype, header, planned, size)


def _plan_tensor(rule: TensorRule, records: Mapping[str, TensorRecord]) -> PlannedTensor:
    record = records.get(MODEL_PREFIX + rule.source)
    if record is None:
        msg = (
            f"the export rule for {rule.key!r} is made from {rule.source!r}, "
            "which the checkpoint does not hold"
        )
        raise StateError(msg)
    if not _is_weight(record):
        msg = f"{rule.source!r} has dtype {record.dtype}; an adapter tensor must be floating point"
        raise StateError(msg)
    shape = list(record.shape)
    if rule.index is not None:
        if len(shape) < 2 or not 0 <= rule.index < shape[0]:
            msg = (
                f"the rule for {rule.key!r} takes slice {rule.index} of dimension 0 of "
                f"{rule.source!r}, whose shape is {tuple(record.shape)}"
            )
            raise StateError(msg)
        del shape[0]
    if len(shape) < 2 or 0 in shape:
        msg = f"{rule.source!r} would give {rule.key!r} the shape {tuple(shape)}; want a matrix"
        raise StateError(msg)
    if rule.pad_dim is not None and rule.pad_to is not None:
        if not 0 <= rule.pad_dim < len(shape) or rule.pad_to < shape[rule.pad_dim]:
            msg = (
                f"the rule for {rule.key!r} pads dimension {rule.pad_dim} to {rule.pad_to}, "
                f"but {rule.source!r} has shape {tuple(shape)} there"
            )
            raise StateError(msg)
        shape[rule.pad_dim] = rule.pad_to
    return PlannedTensor(rule, record, tuple(shape))


def _is_weight(record: TensorRecord) -> bool:
    dtype = TORCH_DTYPES.get(record.dtype)
    return dtype is not None and dtype.is_floating_point


def _check_ranks(planned: tuple[PlannedTensor, ...], export: AdapterExport) -> None:
    for tensor in planned:
        module, side = split_key(tensor.rule.key)
        want = rank_of(export.peft_config, module)
        # A is (rank, in), B is (out, rank); convolutions keep the same first two dimensions.
        have = tensor.shape[0 if side == "A" else 1]
        if have != want:
            msg = (
                f"{tensor.rule.key!r} (from {tensor.rule.source!r}) has rank {have}, but its "
                f"configuration says {want}; engines would mis-scale it or die on it"
            )
            raise StateError(msg)


def _check_complete(
    planned: tuple[PlannedTensor, ...], records: Mapping[str, TensorRecord]
) -> None:
    used: dict[str, set[int | None]] = {}
    for tensor in planned:
        used.setdefault(tensor.record.name, set()).add(tensor.rule.index)
    # Integers and masks are an adapter's state, not its weights: PEFT has no place for them.
    lost = sorted(
        name.removeprefix(MODEL_PREFIX)
        for name, record in records.items()
        if name.startswith(MODEL_PREFIX) and name not in used and _is_weight(record)
    )
    if lost:
        msg = (
            f"{lost[0]!r} is trained but no export rule covers it ({len(lost)} such tensor(s)); "
            "the adapter would not compute what was trained"
        )
        raise StateError(msg)
    for name, indices in used.items():
        missing = set() if None in indices else set(range(records[name].shape[0])) - indices
        if missing:
            msg = f"slice {min(missing)} of {name.removeprefix(MODEL_PREFIX)!r} has no export rule"
            raise StateError(msg)


def check_cover(record: TensorRecord) -> None:
    """Check that a tensor's chunks cover it exactly once and agree with their byte counts.

    Raises:
        DamagedError: names the tensor and what is wrong with it.
    """
    problem = tiling_problem(
        record.shape, [(chunk.offsets, chunk.sizes) for chunk in record.chunks]
    )
    if problem is not None:
        raise DamagedError(f"{record.name!r}: {problem}")
    itemsize = TORCH_DTYPES[record.dtype].itemsize
    for chunk in record.chunks:
        want = math.prod(chunk.sizes) * itemsize
        if chunk.start < 0 or chunk.end - chunk.start != want:
            msg = (
                f"{record.name!r}: its chunk at {list(chunk.offsets)} has bytes "
                f"[{chunk.start}, {chunk.end}) of {chunk.file!r}, want {want} bytes"
            )
            raise DamagedError(msg)


def _lay_out(planned: tuple[PlannedTensor, ...], dtype: str) -> tuple[bytes, int]:
    """Header and file size, after the safetensors format: u64 length, JSON, contiguous data."""
    torch_type, code = EXPORT_DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        end = position + math.prod(tensor.shape) * torch_type.itemsize
        entries[tensor.rule.key] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for readers that map the file
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + position


def stream_adapter(plan: AdapterPlan, source: TensorSource) -> Iterator[memoryview]:
    """Yield the planned file from its first byte to its last.

    Values are scaled in fp32 and then cast, rounding to nearest even.

    Args:
        plan: from :func:`plan_adapter`, over this source's records.
        source: where the chunks' bytes are read.

    Yields:
        Buffers of bytes that the caller may keep; together they have ``plan.size`` bytes.

    Raises:
        NonFiniteError: a value is NaN or infinite, or becomes so in the dtype asked for.
        DamagedError: bytes that do not verify.
        StorageError: the store failed.
    """
    yield memoryview(plan.header)
    dtype, _ = EXPORT_DTYPES[plan.dtype]
    for tensor in plan.tensors:
        rows = tensor.shape[0]
        step = max(1, PIECE_BYTES // (4 * math.prod(tensor.shape[1:])))
        for first in range(0, rows, step):
            block = _read_rows(tensor, first, min(first + step, rows), source)
            if tensor.rule.scale != 1.0:
                block.mul_(tensor.rule.scale)
            yield _encode(block, dtype, tensor.rule)


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


def _read_exactly(source: TensorSource, chunk: Chunk, start: int, end: int) -> bytearray:
    # A bytearray, because torch wants writable memory even where it only reads.
    data = bytearray(source.read(chunk.file, start, end))
    if len(data) != end - start:
        msg = f"{chunk.file!r} gave {len(data)} bytes for [{start}, {end}), want {end - start}"
        raise DamagedError(msg)
    return data


def _encode(block: torch.Tensor, dtype: torch.dtype, rule: TensorRule) -> memoryview:
    buffer = bytearray(block.numel() * dtype.itemsize)
    out = torch.frombuffer(buffer, dtype=dtype)
    out.copy_(block.view(-1))
    # The extremes carry NaN and infinity along, at a small part of an element-wise test's cost.
    if not all(math.isfinite(extreme.item()) for extreme in torch.aminmax(out)):
        name = f"{rule.key!r} (from {rule.source!r})"
        if bool(torch.isfinite(block).all()):
            largest = torch.finfo(dtype).max
            msg = f"{name} does not fit {dtype}: the largest is {largest:g}; export as float32"
        else:
            bad = int((~torch.isfinite(block)).sum())
            msg = f"{name} holds {bad} NaN or infinite value(s); nothing was written"
        raise NonFiniteError(msg)
    return memoryview(buffer)


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
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    out_storage_options: Mapping[str, Any] | None = None,
) -> Consolidated:
    """Write the PEFT adapter directory of a committed step, without a model.

    Args:
        url: the run's root, local or remote.
        step: step number, or None for the newest whole one.
        out: the directory to make, local or remote; readers see all of it or nothing.
        epoch: the writer's epoch, to take an abandoned step.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        overwrite: replace an adapter that is at ``out`` already.
        storage_options: for the root's store.
        out_storage_options: for the store of ``out``; for a remote one those of the root by
            default.

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
    source = StepSource(storage, entry.path, manifest)
    plan = plan_adapter(manifest.export, source.records, dtype)
    options = out_storage_options
    if options is None and local_directory(out) is None:
        options = storage_options
    written = write_adapter_dir(
        out,
        WeightsFile(plan.size, stream_adapter(plan, source)),
        manifest.export.peft_config,
        overwrite=overwrite,
        storage_options=options,
    )
    return Consolidated(entry.step, entry.epoch, written)


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
        export.peft_config,
        overwrite=overwrite,
        storage_options=storage_options,
    )
