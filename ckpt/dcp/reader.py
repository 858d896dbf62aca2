"""A DCP storage reader: finds the step, proves every byte a rank needs, and only then fills in.

Bytes are read and verified while DCP plans (``prepare_local_plan``), into tensors of the reader's
own: DCP stops all ranks if one of them fails there, so that no live tensor is touched on any
rank unless every rank's bytes verified.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckpt.catalog import find_step
from ckpt.dtypes import TORCH_DTYPES
from ckpt.errors import CkptError, DamagedError, NoCheckpoint, PlanError, StateError
from ckpt.fetch import fetch_pieces
from ckpt.layout import MANIFEST, STATE, check_step
from ckpt.manifest import StepManifest
from ckpt.plan import Piece
from ckpt.state import decode_state
from ckpt.storage import Storage, read_checked
from ckpt.types import TensorRecord

from .state_document import entries_of
from .target import Target

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Found:
    """The step that is being read.

    Attributes:
        directory: where it lies, relative to the root.
        manifest: its verified manifest.
        records: its tensors by name.
        entries: its non-tensor entries by name.
        planner_data: what the planner asked to have kept, or None.
    """

    directory: str
    manifest: StepManifest
    records: Mapping[str, TensorRecord]
    entries: Mapping[str, Any]
    planner_data: Any

    @property
    def identity(self) -> str:
        """Equal on two ranks exactly if they read the same step."""
        return f"step {self.manifest.step} of writer {self.manifest.epoch}"


class Reader(StorageReader):
    """Reads for ``dcp.load`` what :class:`~ckpt.dcp.Writer` or a ``CheckpointManager`` wrote.

    Args:
        url: what the writer was given, or the root of a run. A ``checkpoint_id`` in the call
            replaces it and keeps everything else.
        step: number of the step of a run; the newest that is whole if None.
        cast: convert values to the dtype of the live tensor; otherwise another one is refused.
        storage_options: for fsspec (never stored or logged).

    Raises:
        ConfigError: an argument that cannot work.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        step: int | None = None,
        cast: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._target = Target(url, storage_options)
        self._cast = cast
        self._step = None if step is None else check_step(step)
        self._found: Found | None = None
        self._error: CkptError | None = None
        self._leads = True
        self._staged: dict[ReadItem, torch.Tensor] = {}

    @property
    def checkpoint_id(self) -> str:
        """The URL that is read from, fit for a message."""
        return self._target.shown

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a store for the id is known."""
        return Target.known(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another load, from another id if one is given; options and step stay."""
        if checkpoint_id is not None:
            self._target = self._target.at(checkpoint_id)
        self._found = None
        self._error = None
        self._staged.clear()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Find the step and describe what it holds.

        Raises:
            NoCheckpoint: nothing is committed there.
            DamagedError: the manifest or the entries do not verify.
            StorageError: the store failed.
        """
        if "rank" in kwargs and self._error is not None:
            # DCP swallows the first error and asks again, for metadata of this rank alone. The
            # error then has to come from set_up_storage_reader(), where it keeps its class.
            return Metadata({})
        try:
            found = _find(self._target.storage, self._step)
        except CkptError as error:
            self._error = error
            raise
        self._found = found
        self._staged.clear()
        described: dict[str, STORAGE_TYPES] = {
            name: _describe(record) for name, record in found.records.items()
        }
        described |= {name: BytesStorageMetadata() for name in found.entries}
        return Metadata(
            described,
            planner_data=found.planner_data,
            storage_meta=StorageMeta(checkpoint_id=self.checkpoint_id),
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Take note of the role.

        Raises:
            CkptError: what :meth:`read_metadata` found wrong.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        self._leads = is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Read and verify everything the plan asks for; nothing live changes.

        Raises:
            DamagedError: bytes that do not verify.
            StorageError: the store failed.
        """
        found = self._step_found()
        self._staged = self._fetch(found, plan.items)
        return dataclasses.replace(plan, storage_data=found.identity)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Coordinator: make sure that all ranks read the same step.

        Raises:
            PlanError: they do not; a trainer may have committed one in between.
        """
        for rank, plan in enumerate(plans):
            if plan.storage_data != plans[0].storage_data:
                msg = (
                    f"rank 0 reads {plans[0].storage_data} of {self.checkpoint_id}, rank {rank} "
                    f"{plan.storage_data}; name one: Reader(url, step=...)"
                )
                raise PlanError(msg)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Hand the verified values to the planner.

        Raises:
            StateError: a live tensor has another shape or (without ``cast``) dtype than the
                part that is to fill it.
        """
        found = self._step_found()
        tensors = [item for item in plan.items if item.type is LoadItemType.TENSOR]
        late = [item for item in tensors if item not in self._staged]
        if late:  # the planner changed its mind after the local plan
            self._staged |= self._fetch(found, late)
        targets = [planner.resolve_tensor(item).detach() for item in tensors]
        self._check_targets(tensors, targets)
        for item in plan.items:
            if item.type is LoadItemType.BYTE_IO:
                # A planner takes a torch.save of the object; this one is made here, of values
                # that were read from JSON, so no pickle of the checkpoint is involved.
                buffer = io.BytesIO()
                torch.save(found.entries[item.storage_index.fqn], buffer)
                buffer.seek(0)
                planner.load_bytes(item, buffer)
        for item, target in zip(tensors, targets, strict=True):
            target.copy_(self._staged[item])
            planner.commit_tensor(item, target)
        self._staged.clear()
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _step_found(self) -> Found:
        if self._found is None:
            msg = f"{self.checkpoint_id}: read_metadata() comes first"
            raise NoCheckpoint(msg)
        return self._found

    def _fetch(self, found: Found, items: Sequence[ReadItem]) -> dict[ReadItem, torch.Tensor]:
        wanted = list(dict.fromkeys(item for item in items if item.type is LoadItemType.TENSOR))
        pieces = [_piece(found.records, item) for item in wanted]
        values = fetch_pieces(
            self._target.storage,
            found.directory,
            found.manifest,
            pieces,
            # The shards' headers, which no tensor owns, are for one rank to verify.
            share=(0, 1) if self._leads else None,
        )
        return dict(zip(wanted, values, strict=True))

    def _check_targets(self, items: Sequence[ReadItem], targets: Sequence[torch.Tensor]) -> None:
        others = []
        for item, target in zip(items, targets, strict=True):
            value = self._staged[item]
            name = item.dest_index.fqn
            if value.shape != target.shape:
                msg = (
                    f"{name}: a part of shape {list(value.shape)} cannot fill one of shape "
                    f"{list(target.shape)}; nothing was changed on this rank"
                )
                raise StateError(msg)
            if value.dtype != target.dtype:
                others.append(f"{name} is {value.dtype}, the live tensor {target.dtype}")
        if others and not self._cast:
            more = f" (and {len(others) - _SHOWN} more)" if len(others) > _SHOWN else ""
            msg = (
                f"{self.checkpoint_id}: {'; '.join(others[:_SHOWN])}{more}; nothing was changed on "
                "this rank. Reader(url, cast=True) converts"
            )
            raise StateError(msg)


def _find(storage: Storage, step: int | None) -> Found:
    entry = find_step(storage, step)
    manifest = entry.manifest
    if manifest is None:  # find_step() gives whole steps alone
        raise AssertionError
    where = f"{storage.url}/{entry.path}"
    record = next((file for file in manifest.files if file.name.rpartition("/")[2] == STATE), None)
    if record is None:
        raise DamagedError(f"{where}/{MANIFEST} lists no {STATE}")
    path = f"{entry.path}/{record.name}"
    state = decode_state(read_checked(storage, path, record), f"{storage.url}/{path}")
    entries, planner_data = entries_of(state, f"{storage.url}/{path}")
    records = {tensor.name: tensor for tensor in manifest.tensors}
    both = sorted(records.keys() & entries.keys())
    if both:
        raise DamagedError(f"{where}: {both[0]!r} is a tensor and an entry at once")
    return Found(entry.path, manifest, records, entries, planner_data)


def _describe(record: TensorRecord) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=TORCH_DTYPES[record.dtype]),
        size=torch.Size(record.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in record.chunks
        ],
    )


def _piece(records: Mapping[str, TensorRecord], item: ReadItem) -> Piece:
    """The box of the whole tensor that a read item stands for."""
    index = item.storage_index
    record = records.get(index.fqn)
    if record is None:
        raise StateError(f"{index.fqn} is not a tensor of the checkpoint")
    start = index.offset or (0,) * len(record.shape)
    offsets = tuple(a + b for a, b in zip(start, item.storage_offsets, strict=True))
    return Piece(record.name, record.dtype, record.shape, offsets, tuple(item.lengths), True)
