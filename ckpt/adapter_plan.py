"""The PEFT file that a set of checkpoint tensors makes, before a byte of one is read. Pure.

From the export rules and the tensor records follow the file's header, its size and the order of
its tensors.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .coverage import tiling_problem
from .dtypes import TORCH_DTYPES
from .envelope import canonical_json
from .errors import ConfigError, DamagedError, StateError
from .expert_form import stack_experts
from .peft_config import EXPORT_DTYPES, check_export, rank_of, split_key
from .planned import PlannedStack, PlannedTensor
from .types import MODEL_PREFIX, AdapterExport, TensorRecord, TensorRule


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The file that will be written, known before a byte of a tensor is read.

    Attributes:
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        header: length, JSON and padding, up to the first tensor's byte.
        tensors: in file order, which is the sorted order of their PEFT keys.
        size: bytes of the whole file.
        peft_config: content of ``adapter_config.json`` beside it.
    """

    dtype: str
    header: bytes
    tensors: tuple[PlannedTensor | PlannedStack, ...]
    size: int
    peft_config: Mapping[str, Any]


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
    _check_complete(planned, records, export.others)
    for record in {tensor.record.name: tensor.record for tensor in planned}.values():
        check_cover(record)
    tensors: tuple[PlannedTensor | PlannedStack, ...] = planned
    config = export.peft_config
    if export.experts == "stacked":
        tensors, config = stack_experts(planned, config)
    header, size = _lay_out(tensors, dtype)
    return AdapterPlan(dtype, header, tensors, size, config)


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
    planned: tuple[PlannedTensor, ...],
    records: Mapping[str, TensorRecord],
    others: tuple[str, ...],
) -> None:
    elsewhere = {MODEL_PREFIX + name for name in others}
    used: dict[str, set[int | None]] = {}
    for tensor in planned:
        used.setdefault(tensor.record.name, set()).add(tensor.rule.index)
    # Integers and masks are an adapter's state, not its weights: PEFT has no place for them.
    lost = sorted(
        name.removeprefix(MODEL_PREFIX)
        for name, record in records.items()
        if name.startswith(MODEL_PREFIX)
        and name not in used
        and name not in elsewhere
        and _is_weight(record)
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


def _lay_out(planned: tuple[PlannedTensor | PlannedStack, ...], dtype: str) -> tuple[bytes, int]:
    """Header and file size, after the safetensors format: u64 length, JSON, contiguous data."""
    torch_type, code = EXPORT_DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in planned:
        end = position + math.prod(tensor.shape) * torch_type.itemsize
        entries[tensor.key] = {
            "dtype": code,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for readers that map the file
    header = len(text).to_bytes(8, "little") + text
    return header, len(header) + position


class AdapterPlans:
    """The plan of the last published adapter, for the next one of the same tensors and rules."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._records: tuple[TensorRecord, ...] = ()
        self._plan: AdapterPlan | None = None

    def plan(
        self, export: AdapterExport, records: Mapping[str, TensorRecord], dtype: str
    ) -> AdapterPlan:
        """What :func:`plan_adapter` gives; raises as it does."""
        # The configuration is compared in bytes: a caller may change it in place.
        key = (
            dtype,
            canonical_json(export.peft_config),
            export.rules,
            export.others,
            export.experts,
        )
        same = len(records) == len(self._records) and all(
            map(operator.is_, records.values(), self._records)
        )
        if self._plan is None or not same or key != self._key:
            self._plan = plan_adapter(export, records, dtype)
            self._key, self._records = key, tuple(records.values())
        return self._plan
