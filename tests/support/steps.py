"""Committed steps on storage, written by hand: what a manager would leave, without a manager."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from ckpt.checksum import file_record
from ckpt.dtypes import dtype_code
from ckpt.envelope import utc_now
from ckpt.layout import MANIFEST, STATE, new_attempt, shard_name, step_dir, writer_path
from ckpt.manifest import StepManifest, WriterRecord
from ckpt.shard import ShardLayout, ShardTensor
from ckpt.state import encode_state
from ckpt.storage.base import Storage
from ckpt.types import AdapterExport, BaseIdentity, Chunk, TensorRecord, TensorRule


def raw(tensor: torch.Tensor) -> bytes:
    """A tensor's bytes, row-major."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def pieces(tensor: torch.Tensor, world: int, dim: int) -> list[tuple[int, tuple[int, ...], Any]]:
    """(rank, offsets, piece) as ``DTensor`` with ``Shard(dim)`` splits it."""
    if tensor.dim() == 0 or world == 1:
        return [(0, (0,) * tensor.dim(), tensor)]
    dim = min(dim, tensor.dim() - 1)
    width = math.ceil(tensor.shape[dim] / world)
    found = []
    for rank in range(world):
        low, high = rank * width, min((rank + 1) * width, tensor.shape[dim])
        if low < high:
            offsets = tuple(low if d == dim else 0 for d in range(tensor.dim()))
            found.append((rank, offsets, tensor.narrow(dim, low, high - low)))
    return found


def write_writer(storage: Storage, epoch: int, parent: tuple[int, int] | None = None) -> None:
    """The record of a writer; ``parent`` is the (step, epoch) that it resumed from."""
    record = WriterRecord(
        epoch=epoch,
        parent_epoch=parent[1] if parent else None,
        parent_step=parent[0] if parent else None,
        host="test",
        pid=1,
        started=utc_now(),
        nonce=new_attempt(),
    )
    storage.put(writer_path(epoch), record.to_bytes())


def write_step(
    storage: Storage,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    *,
    world: int = 1,
    dim: int | Mapping[str, int] = 0,
    epoch: int = 1,
    export: AdapterExport | None = None,
    base: BaseIdentity | None = None,
    policy_version: int | None = None,
    state: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    created: str | None = None,
) -> StepManifest:
    """Write and commit a step.

    Args:
        storage: the root; a record of writer 1 is made if there is none.
        step: step number.
        tensors: whole tensors by checkpoint name (``model.…``, ``optim.…``).
        world: number of ranks the tensors are sharded over.
        dim: dimension that is sharded, for all or by name (0 where not named).
        epoch: the writer's epoch.
        export: the adapter export.
        base: the base model's identity.
        policy_version: the policy version.
        state: content of ``state.json``.
        metrics: the trainer's values.
        created: when it was saved; now if None.
    """
    if not storage.exists(writer_path(epoch)) and epoch == 1:
        write_writer(storage, 1)
    attempt = new_attempt()
    inner = "" if storage.has_rename else f"{attempt}/"
    by_rank: dict[int, list[tuple[ShardTensor, torch.Tensor]]] = {}
    for name in sorted(tensors):
        split = dim if isinstance(dim, int) else dim.get(name, 0)
        for rank, offsets, piece in pieces(tensors[name], world, split):
            shard = ShardTensor(
                name,
                dtype_code(piece.dtype),
                tuple(piece.shape),
                tuple(tensors[name].shape),
                offsets,
            )
            by_rank.setdefault(rank, []).append((shard, piece))
    files: dict[str, bytes] = {}
    chunks: dict[str, list[Chunk]] = {name: [] for name in tensors}
    for rank, members in by_rank.items():
        layout = ShardLayout.build([shard for shard, _piece in members])
        content = bytearray(layout.size)
        content[: len(layout.header)] = layout.header
        file = inner + shard_name(rank, world)
        for shard, piece in members:
            if not shard.nbytes:
                continue
            start, end = layout.offsets[shard.name]
            content[start:end] = raw(piece)
            chunks[shard.name].append(Chunk(shard.offsets, shard.shape, file, start, end))
        files[file] = bytes(content)
    files[inner + STATE] = encode_state(dict(state or {"step": step}))
    manifest = StepManifest(
        step=step,
        epoch=epoch,
        attempt=attempt,
        created=created or utc_now(),
        writer_version="0.0.test",
        world_size=world,
        mesh=None,
        fingerprint=hashlib.sha256(repr(sorted(tensors)).encode()).hexdigest(),
        base=base,
        export=export,
        tensors=tuple(
            TensorRecord(name, dtype_code(tensor.dtype), tuple(tensor.shape), tuple(chunks[name]))
            for name, tensor in sorted(tensors.items())
        ),
        files=tuple(file_record(name, [files[name]]) for name in sorted(files)),
        adapter_sha256=None,
        policy_version=policy_version,
        metrics=metrics or {},
    )
    directory = step_dir(step, epoch)
    for name, data in files.items():
        storage.put(f"{directory}/{name}", data)
    storage.put(f"{directory}/{MANIFEST}", manifest.to_bytes())
    return manifest


def tiny_adapter(
    modules: tuple[str, ...] = ("layers.0.wq", "layers.0.wo"),
    *,
    rank: int = 4,
    seed: int = 0,
    scale: float = 2.0,
    optimizer: bool = True,
) -> tuple[dict[str, torch.Tensor], AdapterExport]:
    """Checkpoint tensors of a small adapter and its export (A (r, 12), B (10, r), fp32).

    Module ``layers.0.wq`` is exported under the PEFT name ``model.layers.0.wq``; ``scale`` is
    folded into B; with ``optimizer``, Adam's moments lie beside the parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    rules: list[TensorRule] = []
    for module in modules:
        for side, shape in (("a", (rank, 12)), ("b", (10, rank))):
            fqn = f"{module}.lora_{side}.weight"
            tensors[f"model.{fqn}"] = torch.randn(shape, generator=generator)
            if optimizer:
                tensors[f"optim.{fqn}.exp_avg"] = torch.randn(shape, generator=generator)
                tensors[f"optim.{fqn}.step"] = torch.tensor(3.0)
            key = f"base_model.model.model.{module}.lora_{side.upper()}.weight"
            rules.append(TensorRule(fqn, key, scale=scale if side == "b" else 1.0))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "bias": "none",
    }
    return tensors, AdapterExport(config, tuple(rules))
