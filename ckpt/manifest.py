"""The documents that make a step, a version or a writer exist.

Each is a sealed JSON document (see :mod:`ckpt.envelope`); ``docs/format.md`` specifies the
members. ``to_bytes`` refuses to write what ``from_bytes`` would refuse to read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .envelope import Fields, canonical_json, plain_json, seal, unseal
from .errors import ConfigError, DamagedError, PlanError
from .layout import MAX_EPOCH, MAX_STEP, MAX_VERSION, MAX_WORLD, parse_version_name
from .record_codec import (
    base_json,
    export_extras,
    export_json,
    file_json,
    parse_attempt,
    parse_base,
    parse_export,
    parse_files,
    parse_tensors,
    tensor_json,
)
from .types import AdapterExport, BaseIdentity, FileRecord, TensorRecord

STEP_FORMAT = "ckpt.step"
VERSION_FORMAT = "ckpt.version"
WRITER_FORMAT = "ckpt.writer"
SCHEMA = 1
STEP_SCHEMA = 4
"""The newest schema of a step's manifest. One that needs nothing of it is written as schema 1."""

_SINCE = {"metrics": 2, "other_adapters": 3, "experts": 4}
_METRIC_NAME_MAX = 200
_DTYPE_NAME = re.compile(r"[A-Za-z0-9_]{1,32}")


@dataclass(frozen=True, slots=True)
class CheckedTensors:
    """Tensor records that were checked and encoded once, for all the steps that share them.

    A layout may have thousands of records, and they are the same in every step of it.

    Attributes:
        records: the member ``tensors`` of those steps.
        sizes: the files that the records name and the sizes they were checked against.
        encoded: the records in canonical bytes.
    """

    records: tuple[TensorRecord, ...]
    sizes: Mapping[str, int]
    encoded: bytes

    @classmethod
    def of(cls, records: tuple[TensorRecord, ...], files: Iterable[FileRecord]) -> Self:
        """Check and encode.

        Raises:
            PlanError: the records break a rule of the format, or do not fit the files.
        """
        body = [tensor_json(record) for record in records]
        sizes = {file.name: file.size for file in files}
        try:
            parse_tensors(Fields({"tensors": body}, STEP_FORMAT), sizes)
        except DamagedError as error:
            raise PlanError(str(error)) from None
        named = {chunk.file for record in records for chunk in record.chunks}
        return cls(records, {name: sizes[name] for name in named}, canonical_json(body))

    def fits(self, records: tuple[TensorRecord, ...], files: Iterable[FileRecord]) -> bool:
        """Whether the check holds for these very records and files of these sizes."""
        sizes = {file.name: file.size for file in files}
        return records is self.records and self.sizes.items() <= sizes.items()


@dataclass(frozen=True, slots=True)
class StepManifest:
    """What one committed step holds.

    Attributes:
        step: step number.
        epoch: the writer's epoch.
        attempt: id of the try that wrote it; no two tries share one.
        created: ISO 8601, UTC.
        writer_version: version of the package that wrote it.
        world_size: ranks that saved.
        mesh: the device mesh as the writer describes it (JSON), or None.
        fingerprint: hash of the plan; equal for saves of the same layout.
        base: the frozen base model, or None.
        export: how the PEFT adapter is made, or None.
        tensors: every tensor, sorted by name, each covered exactly once by its chunks.
        files: every file but the manifest, sorted by name.
        adapter_sha256: SHA-256 of the adapter in its stored form, or None.
        policy_version: the trainer's count of policy updates, or None.
        metrics: finite values by name that the trainer gave at the save; retention ranks by them.
    """

    step: int
    epoch: int
    attempt: str
    created: str
    writer_version: str
    world_size: int
    mesh: Mapping[str, Any] | None
    fingerprint: str
    base: BaseIdentity | None
    export: AdapterExport | None
    tensors: tuple[TensorRecord, ...]
    files: tuple[FileRecord, ...]
    adapter_sha256: str | None
    policy_version: int | None
    metrics: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self, checked: CheckedTensors | None = None) -> bytes:
        """The file ``MANIFEST.json``.

        Args:
            checked: the tensors as they were checked and encoded for an earlier step; used if it
                is of these very records and the files have the same sizes.

        Raises:
            PlanError: the content breaks a rule of the format; names it.
            ConfigError: ``mesh`` or the PEFT config is not JSON.
        """
        if checked is None or not checked.fits(self.tensors, self.files):
            checked = CheckedTensors.of(self.tensors, self.files)
        body = {
            "step": self.step,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "created": self.created,
            "writer_version": self.writer_version,
            "world_size": self.world_size,
            "mesh": None if self.mesh is None else plain_json(self.mesh, "mesh"),
            "fingerprint": self.fingerprint,
            "base": base_json(self.base),
            "export": export_json(self.export),
            "files": [file_json(file) for file in self.files],
            "adapter_sha256": self.adapter_sha256,
            "policy_version": self.policy_version,
        }
        if self.metrics:
            body["metrics"] = plain_json(self.metrics, "metrics")
        body |= export_extras(self.export)
        _check({**body, "tensors": []}, STEP_FORMAT, _parse_step)
        schema = max([SCHEMA, *(_SINCE[name] for name in _SINCE if name in body)])
        return seal(STEP_FORMAT, schema, body, {"tensors": checked.encoded})

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> StepManifest:
        """Read and verify; ``where`` is the file's path, for messages.

        Raises:
            DamagedError: anything that does not verify; nothing of it may then be used.
        """
        body = unseal(data, STEP_FORMAT, STEP_SCHEMA, where, since=_SINCE)
        return _parse_step(body, where)

    def file(self, name: str) -> FileRecord:
        """The record of a file by its path in the step's directory.

        Raises:
            KeyError: the manifest lists no such file.
        """
        for record in self.files:
            if record.name == name:
                return record
        raise KeyError(name)


@dataclass(frozen=True, slots=True)
class VersionManifest:
    """What one published adapter version holds.

    Attributes:
        number: its number; never used twice in a run.
        name: its name, ``<run>-v<number>``.
        step: the training step it comes from, or None.
        policy_version: the trainer's count of policy updates, or None.
        epoch: the writer's epoch.
        attempt: id of the try that wrote it.
        created: ISO 8601, UTC.
        writer_version: version of the package that wrote it.
        adapter_sha256: SHA-256 of ``adapter_model.safetensors``.
        dtype: dtype of the exported tensors, e.g. ``"bfloat16"``.
        base: the frozen base model, or None.
        files: every file but the manifest, sorted by name.
        probe: expected outputs that prove an engine loaded it (JSON), or None.
    """

    number: int
    name: str
    step: int | None
    policy_version: int | None
    epoch: int
    attempt: str
    created: str
    writer_version: str
    adapter_sha256: str
    dtype: str
    base: BaseIdentity | None
    files: tuple[FileRecord, ...]
    probe: Mapping[str, Any] | None

    def to_bytes(self) -> bytes:
        """The file ``MANIFEST.json``; raises as :meth:`StepManifest.to_bytes`."""
        body = {
            "number": self.number,
            "name": self.name,
            "step": self.step,
            "policy_version": self.policy_version,
            "epoch": self.epoch,
            "attempt": self.attempt,
            "created": self.created,
            "writer_version": self.writer_version,
            "adapter_sha256": self.adapter_sha256,
            "dtype": self.dtype,
            "base": base_json(self.base),
            "files": [file_json(file) for file in self.files],
            "probe": None if self.probe is None else plain_json(self.probe, "probe"),
        }
        return _checked(body, VERSION_FORMAT, _parse_version)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> VersionManifest:
        """Read and verify.

        Raises:
            DamagedError: anything that does not verify.
        """
        return _parse_version(unseal(data, VERSION_FORMAT, SCHEMA, where), where)


@dataclass(frozen=True, slots=True)
class WriterRecord:
    """A writer epoch: who began to write, and on top of what.

    Attributes:
        epoch: 1 for a run's first writer, then counting up.
        parent_epoch: epoch of the step it resumed from, or None for a fresh start.
        parent_step: that step's number, or None.
        host: name of the machine.
        pid: process id there.
        started: ISO 8601, UTC.
        nonce: random text that makes the record unlike any other.
    """

    epoch: int
    parent_epoch: int | None
    parent_step: int | None
    host: str
    pid: int
    started: str
    nonce: str

    def to_bytes(self) -> bytes:
        """The file ``writers/<epoch>.json``; raises as :meth:`StepManifest.to_bytes`."""
        body = {
            "epoch": self.epoch,
            "parent_epoch": self.parent_epoch,
            "parent_step": self.parent_step,
            "host": self.host,
            "pid": self.pid,
            "started": self.started,
            "nonce": self.nonce,
        }
        return _checked(body, WRITER_FORMAT, _parse_writer)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> WriterRecord:
        """Read and verify.

        Raises:
            DamagedError: anything that does not verify.
        """
        return _parse_writer(unseal(data, WRITER_FORMAT, SCHEMA, where), where)


def _checked(
    body: dict[str, Any], kind: str, parse: Callable[[dict[str, Any], str], object]
) -> bytes:
    """Seal a body that its own reader accepts."""
    _check(body, kind, parse)
    return seal(kind, SCHEMA, body)


def _check(body: dict[str, Any], kind: str, parse: Callable[[dict[str, Any], str], object]) -> None:
    """Refuse to write what a reader would refuse to read."""
    try:
        parse(body, kind)
    except DamagedError as error:
        raise PlanError(str(error)) from None


def _parse_step(body: dict[str, Any], where: str) -> StepManifest:
    fields = Fields(body, where)
    files = parse_files(fields)
    tensors = parse_tensors(fields, {file.name: file.size for file in files})
    manifest = StepManifest(
        step=fields.integer("step", 0, MAX_STEP),
        epoch=fields.integer("epoch", 1, MAX_EPOCH),
        attempt=parse_attempt(fields),
        created=fields.timestamp("created"),
        writer_version=fields.text("writer_version", 100),
        world_size=fields.integer("world_size", 1, MAX_WORLD),
        mesh=fields.optional("mesh", fields.json),
        fingerprint=fields.text("fingerprint", 200),
        base=parse_base(fields),
        export=parse_export(fields, body.keys()),
        tensors=tensors,
        files=files,
        adapter_sha256=fields.optional("adapter_sha256", fields.sha256),
        policy_version=fields.optional("policy_version", fields.integer),
        metrics=fields.numbers("metrics", _METRIC_NAME_MAX) if "metrics" in body else {},
    )
    fields.done()
    return manifest


def _parse_version(body: dict[str, Any], where: str) -> VersionManifest:
    fields = Fields(body, where)
    manifest = VersionManifest(
        number=fields.integer("number", 0, MAX_VERSION),
        name=fields.text("name", 100),
        step=fields.optional("step", lambda name: fields.integer(name, 0, MAX_STEP)),
        policy_version=fields.optional("policy_version", fields.integer),
        epoch=fields.integer("epoch", 1, MAX_EPOCH),
        attempt=parse_attempt(fields),
        created=fields.timestamp("created"),
        writer_version=fields.text("writer_version", 100),
        adapter_sha256=fields.sha256("adapter_sha256"),
        dtype=fields.text("dtype", 32),
        base=parse_base(fields),
        files=parse_files(fields),
        probe=fields.optional("probe", fields.json),
    )
    fields.done()
    parsed = parse_version_name(manifest.name)
    if parsed is None or parsed[1] != manifest.number:
        fields.refuse("name", f"must be <run>-v{manifest.number:08d}", manifest.name)
    if not _DTYPE_NAME.fullmatch(manifest.dtype):
        fields.refuse("dtype", "must be a dtype's name", manifest.dtype)
    return manifest


def _parse_writer(body: dict[str, Any], where: str) -> WriterRecord:
    fields = Fields(body, where)
    epoch = fields.integer("epoch", 1, MAX_EPOCH)
    record = WriterRecord(
        epoch=epoch,
        parent_epoch=fields.optional(
            "parent_epoch", lambda name: fields.integer(name, 1, max(1, epoch - 1))
        ),
        parent_step=fields.optional("parent_step", lambda name: fields.integer(name, 0, MAX_STEP)),
        host=fields.text("host", 300),
        pid=fields.integer("pid"),
        started=fields.timestamp("started"),
        nonce=fields.text("nonce", 200),
    )
    fields.done()
    if (record.parent_epoch is None) != (record.parent_step is None):
        fields.refuse("parent_step", "must be null exactly when parent_epoch is", body)
    if record.parent_epoch is not None and record.parent_epoch >= epoch:
        fields.refuse("parent_epoch", f"must be below the epoch {epoch}", record.parent_epoch)
    return record


def check_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """A trainer's metrics in the form that a manifest holds.

    Raises:
        ConfigError: a name that is not 1 to 200 characters, or a value that is not a finite
            number; names it.
    """
    checked = {}
    for name, value in values.items():
        if not isinstance(name, str) or not 1 <= len(name) <= _METRIC_NAME_MAX:
            msg = f"a metric's name has 1 to {_METRIC_NAME_MAX} characters, got {name!r}"
            raise ConfigError(msg)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            msg = f"metrics[{name!r}] must be a finite number, got {value!r}; leave it out"
            raise ConfigError(msg)
        checked[name] = number
    return checked
