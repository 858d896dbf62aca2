"""A checkpoint of another program's as a committed step: the one way in for every importer."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .about import package_version
from .checksum import Crc32Blocks
from .commit import claim_epoch, commit_step, discard, place
from .dcp.parts import tensor_bytes
from .envelope import utc_now
from .errors import CommitUnknown, ConfigError, UnrestoredRoot
from .layout import STATE, check_step, new_attempt, shard_name
from .manifest import StepManifest
from .shard import ShardLayout, ShardTensor
from .state import encode_state
from .storage import Storage, put_checked
from .storage.base import Buffer
from .types import AdapterExport, Chunk, FileRecord, TensorRecord


@dataclass(frozen=True, slots=True)
class ForeignTensor:
    """A whole tensor, read when its bytes are written: one is in memory at a time.

    Attributes:
        dtype: safetensors code.
        shape: global shape.
        read: gives it, contiguous and on the host.
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ForeignStep:
    """What a step is made of.

    Attributes:
        tensors: by checkpoint name (``model.<FQN>``, ``optim.<FQN>.<key>``).
        shared: what is equal on all ranks, by section of ``state.json``.
        ranks: what each rank had; if nothing is known, one rank whose generators start from seed 0.
        export: how a PEFT adapter is made of it, or None.
    """

    tensors: Mapping[str, ForeignTensor]
    shared: Mapping[str, Any]
    ranks: Sequence[Mapping[str, Any]] = ()
    export: AdapterExport | None = None


def commit_foreign(storage: Storage, step: int, foreign: ForeignStep) -> StepManifest:
    """Write and commit a first step.

    Args:
        storage: the run's root; it must not hold steps.
        step: its number.
        foreign: its content.

    Raises:
        ConfigError: the root holds steps already, or the number is none.
        StateError: a value that is not plain data.
        DamagedError: the source cannot be read.
        StorageError: a store failed.
    """
    check_step(step)
    ranks = foreign.ranks or [{"rng": seeded_rng(), "dataloader": None, "per_rank": {}}]
    state = encode_state({"shared": dict(foreign.shared), "ranks": list(ranks)})
    try:
        epoch = claim_epoch(storage, None, seen=None, fresh=False).epoch
    except UnrestoredRoot as error:
        msg = f"{storage.url} holds steps already; import into a root of its own"
        raise ConfigError(msg) from error
    attempt = new_attempt()
    where = place(storage, step, epoch, attempt)
    try:
        name = shard_name(0, 1)
        tensors, files = _write_shard(storage, where.path(name), where.name(name), foreign.tensors)
        files.append(put_checked(storage, where.path(STATE), state, name=where.name(STATE)))
        text = json.dumps([[t.name, t.dtype, t.shape] for t in tensors])
        version = foreign.shared["extra"].get("policy_version")
        manifest = StepManifest(
            step=step,
            epoch=epoch,
            attempt=attempt,
            created=utc_now(),
            writer_version=package_version(),
            world_size=len(ranks),
            mesh=None,
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            base=None,
            export=foreign.export,
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
    return manifest


def seeded_rng() -> dict[str, Any]:
    """Generators as they are after seed 0: the same import gives the same step."""
    return {
        "python": random.Random(0).getstate(),
        "numpy": None,
        "torch": torch.Generator().manual_seed(0).get_state(),
        "cuda": [],
    }


def _write_shard(
    storage: Storage, path: str, name: str, tensors: Mapping[str, ForeignTensor]
) -> tuple[list[TensorRecord], list[FileRecord]]:
    """All tensors as one file, streamed; the records of the tensors and of the file."""
    ordered = dict(sorted(tensors.items()))
    layout = ShardLayout.build(
        [
            ShardTensor(target, tensor.dtype, tensor.shape, tensor.shape, (0,) * len(tensor.shape))
            for target, tensor in ordered.items()
        ]
    )
    records = []
    for target, tensor in ordered.items():
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
            view = tensor_bytes(ordered[target].read())
            crc.update(view)
            yield view

    storage.put_stream(path, stream(), layout.size)
    return records, [crc.record(name)]
