"""From what a root holds to what the API says of it."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

from ckpt.catalog import StepEntry
from ckpt.dtypes import item_bytes
from ckpt.holds import Lease, Pin
from ckpt.manifest import StepManifest, VersionManifest
from ckpt.types import BaseIdentity, FileRecord, TensorRecord
from ckpt.versions import VersionEntry
from ckpt.wire import (
    BaseRow,
    ChunkRow,
    FileRow,
    LeaseRow,
    PinRow,
    StepDetail,
    StepRow,
    TensorRow,
    VerifiedRow,
    VersionDetail,
    VersionRow,
)


def step_row(
    entry: StepEntry,
    *,
    pinned: Container[str] = (),
    verified: Mapping[str, VerifiedRow] | None = None,
) -> StepRow:
    """A step as a listing shows it."""
    manifest = entry.manifest
    name = entry.path.rpartition("/")[2]
    return StepRow(
        step=entry.step,
        epoch=entry.epoch,
        state=entry.state,
        path=entry.path,
        bytes=entry.bytes,
        files=None if manifest is None else len(manifest.files),
        tensors=None if manifest is None else len(manifest.tensors),
        world_size=None if manifest is None else manifest.world_size,
        policy_version=None if manifest is None else manifest.policy_version,
        has_adapter=None if manifest is None else manifest.export is not None,
        created=None if manifest is None else manifest.created,
        metrics={} if manifest is None else dict(manifest.metrics),
        problem=entry.problem,
        pinned=name in pinned,
        verified=(verified or {}).get(name),
    )


def step_detail(summary: StepRow, manifest: StepManifest) -> StepDetail:
    """A step down to its tensors."""
    export = manifest.export
    return StepDetail(
        summary=summary,
        attempt=manifest.attempt,
        writer_version=manifest.writer_version,
        mesh=None if manifest.mesh is None else dict(manifest.mesh),
        fingerprint=manifest.fingerprint,
        base=base_row(manifest.base),
        peft_config=None if export is None else dict(export.peft_config),
        files=tuple(map(file_row, manifest.files)),
        tensors=tuple(map(tensor_row, manifest.tensors)),
    )


def tensor_row(record: TensorRecord) -> TensorRow:
    """A tensor with its pieces."""
    return TensorRow(
        name=record.name,
        dtype=record.dtype,
        shape=tuple(record.shape),
        bytes=math.prod(record.shape) * (item_bytes(record.dtype) or 0),
        chunks=tuple(
            ChunkRow(tuple(c.offsets), tuple(c.sizes), c.file, c.start, c.end)
            for c in record.chunks
        ),
    )


def file_row(record: FileRecord) -> FileRow:
    """A file."""
    return FileRow(record.name, record.size, f"{record.crc32:08x}")


def base_row(base: BaseIdentity | None) -> BaseRow | None:
    """A base model."""
    return None if base is None else BaseRow(base.name, base.config_hash)


def version_row(
    entry: VersionEntry,
    *,
    held: str | None = None,
    verified: Mapping[str, VerifiedRow] | None = None,
) -> VersionRow:
    """A version as a listing shows it."""
    manifest = entry.manifest
    return VersionRow(
        name=entry.name,
        run_name=entry.run,
        number=entry.number,
        state=entry.state,
        path=entry.path,
        bytes=entry.bytes,
        step=None if manifest is None else manifest.step,
        policy_version=None if manifest is None else manifest.policy_version,
        epoch=None if manifest is None else manifest.epoch,
        dtype=None if manifest is None else manifest.dtype,
        adapter_sha256=None if manifest is None else manifest.adapter_sha256,
        created=None if manifest is None else manifest.created,
        problem=entry.problem,
        has_probe=manifest is not None and manifest.probe is not None,
        held=held,
        verified=(verified or {}).get(entry.name),
    )


def version_detail(summary: VersionRow, manifest: VersionManifest) -> VersionDetail:
    """A committed version with its sealed manifest."""
    return VersionDetail(
        summary=summary,
        files=tuple(map(file_row, manifest.files)),
        base=base_row(manifest.base),
        probe=None if manifest.probe is None else dict(manifest.probe),
        manifest=manifest.to_bytes().decode(),
    )


def lease_row(lease: Lease, *, live: bool) -> LeaseRow:
    """A lease."""
    return LeaseRow(lease.version, lease.holder, lease.renewed, lease.expires, live)


def pin_row(pin: Pin) -> PinRow:
    """A pin."""
    return PinRow(pin.name, pin.note, pin.host, pin.created)
