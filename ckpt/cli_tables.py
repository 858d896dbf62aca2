"""What the ``ckpt`` command shows, as plain data for ``--json`` and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from .catalog import StepEntry
from .dtypes import item_bytes
from .manifest import StepManifest
from .types import MODEL_PREFIX, OPTIM_PREFIX, BaseIdentity, FileRecord, TensorRecord
from .versions import VersionEntry

_COLOURS: Final = {
    "committed": "green",
    "ok": "green",
    "abandoned": "yellow",
    "incomplete": "yellow",
    "claimed": "yellow",
    "damaged": "bold red",
}
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


def size_text(size: int | None) -> str:
    """A size in decimal units: ``81.3 MB``; ``-`` where it is not known."""
    if size is None:
        return "-"
    value = float(size)
    for unit in _UNITS[:-1]:
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {_UNITS[-1]}"


def time_text(created: str | None) -> str:
    """``2026-01-31 12:00:00`` of an ISO 8601 time in UTC."""
    return "-" if created is None else created.replace("T", " ").partition(".")[0].rstrip("Z")


def step_json(entry: StepEntry) -> dict[str, Any]:
    """A step as ``ckpt ls --json`` shows it."""
    manifest = entry.manifest
    return {
        "step": entry.step,
        "epoch": entry.epoch,
        "state": entry.state,
        "path": entry.path,
        "bytes": entry.bytes,
        "files": None if manifest is None else len(manifest.files),
        "tensors": None if manifest is None else len(manifest.tensors),
        "world_size": None if manifest is None else manifest.world_size,
        "policy_version": None if manifest is None else manifest.policy_version,
        "has_adapter": None if manifest is None else manifest.export is not None,
        "created": None if manifest is None else manifest.created,
        "problem": entry.problem,
    }


def version_json(entry: VersionEntry) -> dict[str, Any]:
    """A version as ``ckpt ls --json`` shows it."""
    manifest = entry.manifest
    return {
        "name": entry.name,
        "run": entry.run,
        "number": entry.number,
        "state": entry.state,
        "path": entry.path,
        "bytes": entry.bytes,
        "step": None if manifest is None else manifest.step,
        "policy_version": None if manifest is None else manifest.policy_version,
        "epoch": None if manifest is None else manifest.epoch,
        "dtype": None if manifest is None else manifest.dtype,
        "adapter_sha256": None if manifest is None else manifest.adapter_sha256,
        "created": None if manifest is None else manifest.created,
        "problem": entry.problem,
    }


def manifest_json(entry: StepEntry, manifest: StepManifest) -> dict[str, Any]:
    """A step as ``ckpt inspect --json`` shows it: the listing's members and the content."""
    export = manifest.export
    return {
        **step_json(entry),
        "attempt": manifest.attempt,
        "writer_version": manifest.writer_version,
        "mesh": manifest.mesh,
        "fingerprint": manifest.fingerprint,
        "base": base_json(manifest.base),
        "metrics": dict(manifest.metrics),
        "peft_config": None if export is None else dict(export.peft_config),
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor_bytes(tensor),
                "chunks": len(tensor.chunks),
            }
            for tensor in manifest.tensors
        ],
        "files": [file_json(file) for file in manifest.files],
    }


def base_json(base: BaseIdentity | None) -> dict[str, str] | None:
    """A base model's identity."""
    return None if base is None else {"name": base.name, "config_hash": base.config_hash}


def file_json(file: FileRecord) -> dict[str, Any]:
    """A file with its checksum as eight hexadecimal digits."""
    return {"name": file.name, "bytes": file.size, "crc32": f"{file.crc32:08x}"}


def tensor_bytes(tensor: TensorRecord) -> int:
    """Bytes of a whole tensor."""
    return math.prod(tensor.shape) * (item_bytes(tensor.dtype) or 0)


def state_text(state: str) -> Text:
    """A state in its colour."""
    return Text(state, style=_COLOURS.get(state, ""))


def steps_table(entries: Sequence[StepEntry]) -> Table:
    """The steps of a root, newest last."""
    table = _table("steps", ("step", "writer"), ("state",), ("size", "ranks", "tensors", "policy"))
    table.add_column("created (UTC)")
    for entry in entries:
        manifest = entry.manifest
        table.add_row(
            str(entry.step),
            str(entry.epoch),
            state_text(entry.state),
            size_text(entry.bytes),
            "-" if manifest is None else str(manifest.world_size),
            "-" if manifest is None else str(len(manifest.tensors)),
            _number(None if manifest is None else manifest.policy_version),
            time_text(None if manifest is None else manifest.created),
        )
    return table


def versions_table(
    entries: Sequence[VersionEntry], holds: Sequence[str | None] | None = None
) -> Table:
    """The published versions of a root, newest last; with what holds each, if that is known."""
    table = _table("published versions", (), ("version", "state"), ("step", "policy"))
    for name in ("dtype", "SHA-256", "created (UTC)"):
        table.add_column(name, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    if holds is not None:
        table.add_column("held", overflow="fold")
    for place, entry in enumerate(entries):
        manifest = entry.manifest
        table.add_row(
            entry.name,
            state_text(entry.state),
            _number(None if manifest is None else manifest.step),
            _number(None if manifest is None else manifest.policy_version),
            "-" if manifest is None else manifest.dtype,
            "-" if manifest is None else f"{manifest.adapter_sha256[:12]}…",
            time_text(None if manifest is None else manifest.created),
            size_text(entry.bytes),
            *([] if holds is None else [holds[place] or "-"]),
        )
    return table


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names and values, without a frame."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, Text(value))
    return table


def step_facts(entry: StepEntry, manifest: StepManifest) -> list[tuple[str, str]]:
    """The head of ``ckpt inspect`` for a step."""
    trained = [tensor for tensor in manifest.tensors if tensor.name.startswith(MODEL_PREFIX)]
    optimizer = [tensor for tensor in manifest.tensors if tensor.name.startswith(OPTIM_PREFIX)]
    facts = [
        ("step", f"{entry.step} ({entry.state}), by writer {entry.epoch}"),
        ("path", entry.path),
        ("created", f"{time_text(manifest.created)} UTC by version {manifest.writer_version}"),
        ("ranks", str(manifest.world_size)),
        ("policy version", _number(manifest.policy_version)),
        ("base model", "-" if manifest.base is None else manifest.base.name),
        ("model tensors", f"{len(trained)}, {size_text(sum(map(tensor_bytes, trained)))}"),
        ("optimizer tensors", f"{len(optimizer)}, {size_text(sum(map(tensor_bytes, optimizer)))}"),
    ]
    if manifest.metrics:
        values = sorted(manifest.metrics.items())
        facts.append(("metrics", ", ".join(f"{name} {value:.6g}" for name, value in values)))
    if manifest.export is None:
        return [*facts, ("adapter", "none: this step cannot be exported")]
    config = manifest.export.peft_config
    targets = config.get("target_modules")
    shown = targets if isinstance(targets, str) else ", ".join(map(str, targets or ()))
    adapter = f"{len(manifest.export.rules)} PEFT tensors, r={config.get('r')}, "
    return [*facts, ("adapter", f"{adapter}lora_alpha={config.get('lora_alpha')}, on {shown}")]


def version_facts(entry: VersionEntry) -> list[tuple[str, str]]:
    """The head of ``ckpt inspect`` for a version."""
    facts = [("version", f"{entry.name} ({entry.state})"), ("path", entry.path)]
    manifest = entry.manifest
    if manifest is None:
        return facts
    return [
        *facts,
        ("created", f"{time_text(manifest.created)} UTC by version {manifest.writer_version}"),
        ("step", f"{_number(manifest.step)}, by writer {manifest.epoch}"),
        ("policy version", _number(manifest.policy_version)),
        ("base model", "-" if manifest.base is None else manifest.base.name),
        ("dtype", manifest.dtype),
        ("SHA-256", manifest.adapter_sha256),
    ]


def files_table(files: Sequence[FileRecord]) -> Table:
    """Files with size and checksum."""
    table = _table("files", (), ("file",), ("size",))
    table.add_column("CRC32", no_wrap=True)
    for file in files:
        table.add_row(file.name, size_text(file.size), f"{file.crc32:08x}")
    return table


def tensors_table(tensors: Sequence[TensorRecord], total: int) -> Table:
    """Tensors with shape and number of pieces; ``total`` of them exist."""
    title = "tensors" if len(tensors) == total else f"tensors (first {len(tensors)} of {total})"
    table = _table(title, (), ("tensor", "dtype", "shape"), ("chunks", "size"))
    for tensor in tensors:
        table.add_row(
            tensor.name,
            tensor.dtype,
            " x ".join(map(str, tensor.shape)) or "scalar",
            str(len(tensor.chunks)),
            size_text(tensor_bytes(tensor)),
        )
    return table


def _table(
    title: str, numbers: Iterable[str], texts: Iterable[str], more_numbers: Iterable[str]
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in more_numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
