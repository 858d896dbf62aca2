"""A stock DCP checkpoint as a committed step, from which a ``CheckpointManager`` resumes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckpt.about import package_version
from ckpt.checksum import Crc32Blocks
from ckpt.commit import claim_epoch, commit_step, discard, place
from ckpt.envelope import utc_now
from ckpt.errors import CommitUnknown, ConfigError, UnrestoredRoot
from ckpt.layout import STATE, check_step, new_attempt, shard_name
from ckpt.manifest import StepManifest
from ckpt.shard import ShardLayout, ShardTensor
from ckpt.state import encode_state
from ckpt.storage import Storage, open_storage, put_checked
from ckpt.storage.base import Buffer
from ckpt.types import Chunk, FileRecord, TensorRecord

from .mapping import Choices, Mapped, map_names
from .parts import tensor_bytes
from .stock import StockCheckpoint


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        manifest: the committed step's.
        skipped: names that were left out because the caller said so.
        entries: number of non-tensor entries of the source.
    """

    manifest: StepManifest
    skipped: tuple[str, ...]
    entries: int


def import_checkpoint(
    source: str,
    root: str,
    *,
    step: int = 0,
    choices: Choices | None = None,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """Convert a checkpoint of stock DCP into the first step of a run.

    One tensor is in memory at a time. Where the checkpoint says nothing about the ranks' random
    number generators (stock DCP never does), they begin from seed 0.

    Args:
        source: directory or URL with the ``.metadata``.
        root: root of the run; it must not hold steps.
        step: number that the step gets.
        choices: how names are understood; see :mod:`ckpt.dcp.mapping`.
        source_options: for the source's store.
        storage_options: for the root's store.

    Raises:
        NoCheckpoint: the source is no such checkpoint.
        ConfigError: the root holds steps already, or a choice matches nothing.
        StateError: something in the source has no place in a step, or is not plain data.
        DamagedError: the source cannot be read.
        StorageError: a store failed.
    """
    check_step(step)
    stock = StockCheckpoint(open_storage(source, source_options))
    mapped = map_names(stock, choices or Choices())
    state = _state(mapped)
    storage = open_storage(root, storage_options)
    try:
        epoch = claim_epoch(storage, None, seen=None, fresh=False).epoch
    except UnrestoredRoot as error:
        msg = f"{storage.url} holds steps already; import into a root of its own"
        raise ConfigError(msg) from error
    attempt = new_attempt()
    where = place(storage, step, epoch, attempt)
    try:
        name = shard_name(0, 1)
        tensors, files = _write_shard(storage, where.path(name), where.name(name), stock, mapped)
        files.append(put_checked(storage, where.path(STATE), state, name=where.name(STATE)))
        text = json.dumps([[t.name, t.dtype, t.shape] for t in tensors])
        version = mapped.shared["extra"].get("policy_version")
        manifest = StepManifest(
            step=step,
            epoch=epoch,
            attempt=attempt,
            created=utc_now(),
            writer_version=package_version(),
            world_size=max(1, len(mapped.ranks)),
            mesh=None,
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            base=None,
            export=None,
            tensors=tuple(tensors),
            files=tuple(sorted(files, key=lambda record: record.name)),
            adapter_sha256=None,
            policy_version=version if type(version) is int else None,
        )
        commit_step(storage, where, manifest)
    except CommitUnknown:
        raise  # its files must stay: the step may exist
    except Exception:
        discard(storage, where.scratch)
        raise
    return Imported(manifest, tuple(mapped.skipped), len(stock.entries))


def _state(mapped: Mapped) -> bytes:
    ranks = mapped.ranks or [{"rng": _seeded_rng(), "dataloader": None, "per_rank": {}}]
    return encode_state({"shared": mapped.shared, "ranks": ranks})


def _seeded_rng() -> dict[str, Any]:
    """Generators as they are after seed 0: the same import gives the same step."""
    return {
        "python": random.Random(0).getstate(),
        "numpy": None,
        "torch": torch.Generator().manual_seed(0).get_state(),
        "cuda": [],
    }


def _write_shard(
    storage: Storage, path: str, name: str, stock: StockCheckpoint, mapped: Mapped
) -> tuple[list[TensorRecord], list[FileRecord]]:
    """All tensors as one file, streamed; the records of the tensors and of the file."""
    layout = ShardLayout.build(
        [
            ShardTensor(target, tensor.dtype, tensor.shape, tensor.shape, (0,) * len(tensor.shape))
            for target, tensor in (
                (target, stock.tensors[origin]) for target, origin in sorted(mapped.tensors.items())
            )
        ]
    )
    records = []
    for target, origin in sorted(mapped.tensors.items()):
        tensor = stock.tensors[origin]
        chunks: tuple[Chunk, ...] = ()
        if target in layout.offsets:
            offsets = (0,) * len(tensor.shape)
            chunks = (Chunk(offsets, tensor.shape, name, *layout.offsets[target]),)
        records.append(TensorRecord(target, tensor.dtype, tensor.shape, chunks))
    if not layout.offsets:
        return records, []
    crc = Crc32Blocks()

    def stream() -> Iterator[Buffer]:
        crc.update(layout.header)
        yield layout.header
        for target in layout.offsets:
            view = tensor_bytes(stock.read_tensor(mapped.tensors[target]))
            crc.update(view)
            yield view

    storage.put_stream(path, stream(), layout.size)
    return records, [crc.record(name)]
