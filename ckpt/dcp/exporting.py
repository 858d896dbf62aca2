"""A committed step as a checkpoint that stock ``dcp.load(storage_reader=FileSystemReader)`` reads.

A trainer's step gets the form in which ``torch.distributed.checkpoint.state_dict`` has states:
``{"model": {FQN: …}, "optim": {"state": {FQN: {key: …}}, "param_groups": [...]}, "scheduler": …,
"extra": …, "trainer_state": text}``. The text holds schedule, extra values and each rank's state
once more and exactly: DCP loses empty dictionaries and keys that are not text. What
``ckpt.dcp.Writer`` wrote gets the names it had.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from ckpt.catalog import StepEntry, find_step
from ckpt.dtypes import TORCH_DTYPES
from ckpt.errors import AlreadyExists, ConfigError, DamagedError, NoCheckpoint, StateError
from ckpt.layout import MANIFEST, STATE, TMP_PREFIX, new_attempt
from ckpt.manifest import StepManifest
from ckpt.peft import local_directory
from ckpt.source import StepSource, TensorSource
from ckpt.state import decode_state, encode_state
from ckpt.storage import Storage, open_storage, read_checked
from ckpt.types import MODEL_PREFIX, OPTIM_PREFIX, TensorRecord

from .failure import converted
from .mapping import TRAINER
from .nested import nest
from .state_document import entries_of, is_dcp_state


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: from which step, where to, and how much."""

    entry: StepEntry
    out: Path
    tensors: int
    size: int


def export_checkpoint(
    url: str,
    out: str,
    *,
    step: int | None = None,
    epoch: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a step in stock DCP's own format.

    Tensors are read one at a time, every byte verified, and the directory appears by a rename.

    Args:
        url: the run's root, or what a ``Writer`` was given.
        out: the directory to make, on this machine: stock DCP reads no other.
        step: the step's number, or None for the newest that is whole.
        epoch: its writer; only needed for an abandoned step.
        storage_options: for the root's store.

    Raises:
        NoCheckpoint: there is no such step.
        ConfigError: ``out`` is a URL.
        AlreadyExists: ``out`` exists.
        DamagedError: the step does not verify.
        StateError: it holds neither a trainer's state nor a DCP state dict.
        StorageError: a store failed, or the disk is full.
    """
    target = local_directory(out)
    if target is None:
        raise ConfigError(f"stock DCP reads local directories; {out} is a URL")
    if target.exists():
        raise AlreadyExists(f"{target} exists already; choose another name")
    storage = open_storage(url, storage_options)
    entry = find_step(storage, step, epoch=epoch)
    manifest = entry.manifest
    if manifest is None:
        raise NoCheckpoint(f"step {entry.step} has no manifest: {entry.problem}")
    records, tree = _tree(storage, entry, manifest)
    parent = open_storage(target.parent)
    temporary = f"{TMP_PREFIX}{new_attempt()}"
    planner = _Streaming(StepSource(storage, entry.path, manifest), records)
    try:
        with converted(), warnings.catch_warnings():
            # DCP warns that there is one process, which is what is meant here.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            writer = FileSystemWriter(target.parent / temporary)
            save(tree, storage_writer=writer, planner=planner, no_dist=True)
        parent.rename_dir(temporary, target.name)
    finally:
        parent.delete_tree(temporary)
    size = sum(path.stat().st_size for path in target.iterdir())
    return Exported(entry, target, len(records), size)


def _tree(
    storage: Storage, entry: StepEntry, manifest: StepManifest
) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    """Records by their stock name, and the state dict with tensors on the meta device."""
    record = next((file for file in manifest.files if file.name.rpartition("/")[2] == STATE), None)
    if record is None:
        raise DamagedError(f"{storage.url}/{entry.path}/{MANIFEST} lists no {STATE}")
    path = f"{entry.path}/{record.name}"
    where = f"{storage.url}/{path}"
    value = decode_state(read_checked(storage, path, record), where)
    if is_dcp_state(value):
        entries, paths = entries_of(value, where)
        records = {tensor.name: tensor for tensor in manifest.tensors}
        flat = {**{name: _meta(tensor) for name, tensor in records.items()}, **entries}
        return records, nest(flat, paths if isinstance(paths, dict) else {})
    if not isinstance(value, dict) or value.keys() != {"shared", "ranks"}:
        raise StateError(f"{where} is neither a trainer's state nor that of a DCP checkpoint")
    return _trainer_tree(manifest, value["shared"], value["ranks"])


def _trainer_tree(
    manifest: StepManifest, shared: Mapping[str, Any], ranks: list[Any]
) -> tuple[dict[str, TensorRecord], dict[str, Any]]:
    by_name = {tensor.name: tensor for tensor in manifest.tensors}
    records: dict[str, TensorRecord] = {}
    model: dict[str, Any] = {}
    for name, tensor in by_name.items():
        if name.startswith(MODEL_PREFIX):
            model[name.removeprefix(MODEL_PREFIX)] = _meta(tensor)
            records[name] = tensor
    tree: dict[str, Any] = {"model": model}
    optimizer = shared["optimizer"]
    if optimizer is not None:
        state: dict[str, dict[str, Any]] = {}
        for fqn, keys in optimizer["tensors"].items():
            for key in keys:
                tensor = by_name[f"{OPTIM_PREFIX}{fqn}.{key}"]
                state.setdefault(fqn, {})[key] = _meta(tensor)
                records[f"optim.state.{fqn}.{key}"] = tensor
        for fqn, values in optimizer["values"].items():
            state.setdefault(fqn, {}).update(values)
        tree["optim"] = {"state": state, "param_groups": optimizer["groups"]}
    if shared["scheduler"] is not None:
        tree["scheduler"] = shared["scheduler"]
    if shared["extra"]:
        tree["extra"] = shared["extra"]
    exact = {
        "kind": None if optimizer is None else optimizer["kind"],
        "scheduler": shared["scheduler"],
        "extra": shared["extra"],
        "ranks": ranks,
    }
    tree[TRAINER] = encode_state(exact).decode("ascii")
    return records, tree


def _meta(record: TensorRecord) -> torch.Tensor:
    return torch.empty(record.shape, dtype=TORCH_DTYPES[record.dtype], device="meta")


class _Streaming(DefaultSavePlanner):
    """DCP's planner over tensors that are read when they are written."""

    def __init__(self, source: TensorSource, records: Mapping[str, TensorRecord]) -> None:
        super().__init__()
        self._source = source
        self._records = records

    def lookup_object(self, index: MetadataIndex) -> Any:
        """An entry itself, or a tensor's value."""
        found = super().lookup_object(index)
        if isinstance(found, torch.Tensor) and found.is_meta:
            return _read(self._source, self._records[index.fqn])
        return found


def _read(source: TensorSource, record: TensorRecord) -> torch.Tensor:
    """A whole tensor from its verified chunks."""
    dtype = TORCH_DTYPES[record.dtype]
    result = torch.empty(record.shape, dtype=dtype)
    for chunk in record.chunks:
        data = bytearray(source.read(chunk.file, chunk.start, chunk.end))
        place = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
        result[place] = torch.frombuffer(data, dtype=dtype).view(chunk.sizes)
    return result
