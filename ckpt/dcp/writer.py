"""A DCP storage writer: each rank writes one safetensors shard, rank 0 commits.

A checkpoint id is a URL, and one id holds one checkpoint for ever: it lies there as step 0 of
writer 1, so that every tool for a run's root works on it too. The coordinator hands each rank a
ticket with its plan; what a rank wrote comes back with DCP's own gather. No manifest is written
unless every rank's part is in, covers the plan exactly, and has its size on storage.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt.about import package_version
from ckpt.catalog import read_writers
from ckpt.commit import Place, commit_step, discard
from ckpt.dtypes import dtype_code
from ckpt.envelope import utc_now
from ckpt.errors import (
    AlreadyExists,
    CommitUnknown,
    ConfigError,
    DamagedError,
    PlanError,
    StepExists,
    StorageError,
)
from ckpt.layout import (
    MANIFEST,
    STATE,
    STEPS,
    new_attempt,
    parse_step_dir,
    parse_tmp_step_dir,
    step_dir,
    writer_path,
)
from ckpt.manifest import StepManifest, WriterRecord
from ckpt.storage import Storage, put_checked
from ckpt.types import Chunk, FileRecord, TensorRecord

from .parts import EPOCH, STEP, Part, Ticket, code_of, encode_item, place_of, result_of, write_shard
from .state_document import compose
from .target import Target

logger = logging.getLogger(__name__)

_NONCE_PREFIX = "dcp-"
"""Marks the writer record of such an id: a trainer's root has another and is left alone."""


class Writer(StorageWriter):
    """Writes what ``dcp.save`` and ``dcp.async_save`` hand over, in this package's format.

    Args:
        url: where the checkpoint goes: a directory or a URL, which may hold none yet. A
            ``checkpoint_id`` in the call replaces it and keeps the options.
        storage_options: for fsspec (never stored or logged).
    """

    def __init__(
        self, url: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self._target = Target(url, storage_options)
        self._ticket: Ticket | None = None

    @property
    def checkpoint_id(self) -> str:
        """The URL that is written to, fit for a message."""
        return self._target.shown

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether a store for the id is known."""
        return Target.known(checkpoint_id)

    def storage_meta(self) -> StorageMeta:
        """What planners are told of the storage."""
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin another save, at another id if one is given; storage options stay."""
        if checkpoint_id is not None:
            self._target = self._target.at(checkpoint_id)
            self._ticket = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Clear away an earlier try of this writer that was never committed.

        Raises:
            ConfigError: the save runs without collectives, so nothing could commit it as a whole.
        """
        if not kwargs.get("use_collectives", True):
            msg = (
                "use_collectives=False lets every rank commit on its own, so a checkpoint could be "
                "half there; leave it out"
            )
            raise ConfigError(msg)
        if is_coordinator and self._ticket is not None:
            discard(self._target.storage, place_of(self._target.storage, self._ticket).scratch)
        self._ticket = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what the format cannot hold before anything is written.

        Raises:
            StateError: a dtype that the format does not know; names the tensor.
            ConfigError: a planner that sends cached plans.
        """
        _refuse_cached(plan)
        for item in plan.items:
            if item.tensor_data is not None:
                code_of(item)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Coordinator: make sure that the id is free, and give every rank its ticket.

        Raises:
            StepExists: the id holds a committed checkpoint.
            ConfigError: it is the root of a trainer's run.
        """
        for plan in plans:
            _refuse_cached(plan)
        storage = self._target.storage
        self._refuse_committed(storage)
        _mark(storage)
        attempt = new_attempt()
        tickets = [Ticket(self._target.url, attempt, n, len(plans)) for n in range(len(plans))]
        self._ticket = tickets[0]
        return [
            dataclasses.replace(plan, storage_data=ticket)
            for plan, ticket in zip(plans, tickets, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard; encode the non-tensor entries it was given.

        Raises:
            ConfigError: the plan was not made for this save of this writer.
            StateError: a value that cannot be stored; names it.
            StorageError: the store failed.
        """
        ticket = plan.storage_data
        if not isinstance(ticket, Ticket) or ticket.url != self._target.url:
            msg = (
                f"the plan of this save is not for {self.checkpoint_id}: use one Writer for one "
                "save at a time, with the same id on every rank"
            )
            raise ConfigError(msg)
        storage = self._target.storage
        results = [
            result_of(item, Part(ticket.attempt, value=encode_item(item, planner)))
            for item in plan.items
            if item.type is WriteItemType.BYTE_IO
        ]
        results += write_shard(storage, ticket, plan.items, planner)
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Coordinator: check what the ranks wrote against the plan, and commit it.

        Raises:
            PlanError: something planned was not written, or twice.
            DamagedError: a file has another size on storage than its rank wrote.
            StepExists: somebody else committed this id meanwhile.
            StorageError: the store failed.
            CommitUnknown: the manifest's fate could not be read back.
        """
        ticket = self._ticket
        if ticket is None:
            msg = f"no save to {self.checkpoint_id} is under way"
            raise ConfigError(msg)
        storage = self._target.storage
        where = place_of(storage, ticket)
        try:
            parts = _parts(ticket, results)
            manifest = _manifest(storage, where, ticket, metadata, parts)
            commit_step(storage, where, manifest)
        except CommitUnknown:
            # Its files must stay: the checkpoint may exist.
            self._ticket = None
            raise
        except Exception:
            discard(storage, where.scratch)
            self._ticket = None
            # Whoever commits first clears the others' files away; that is then the cause.
            self._refuse_committed(storage)
            raise
        self._ticket = None
        _sweep(storage, ticket.attempt)

    def _refuse_committed(self, storage: Storage) -> None:
        for entry in storage.list(STEPS):
            if parse_step_dir(entry.name) and storage.exists(f"{STEPS}/{entry.name}/{MANIFEST}"):
                msg = (
                    f"{self.checkpoint_id} holds a committed checkpoint already, which is never "
                    "overwritten; save under another checkpoint_id"
                )
                raise StepExists(msg)


def _refuse_cached(plan: SavePlan) -> None:
    if not plan.usable:
        msg = (
            "the planner caches plans for the whole process, under which tensors have been lost; "
            "use DefaultSavePlanner(enable_plan_caching=False)"
        )
        raise ConfigError(msg)


def _mark(storage: Storage) -> None:
    """Claim the id for checkpoints of this kind; several tries at one id may do so."""
    record = WriterRecord(
        epoch=EPOCH,
        parent_epoch=None,
        parent_step=None,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=utc_now(),
        nonce=_NONCE_PREFIX + uuid.uuid4().hex,
    )
    if not storage.exists(writer_path(EPOCH)):
        try:
            storage.put_new(writer_path(EPOCH), record.to_bytes())
        except AlreadyExists:
            logger.debug("another save to %s began at the same time", storage.url)
    for found in read_writers(storage):
        if found.epoch != EPOCH or not found.nonce.startswith(_NONCE_PREFIX):
            msg = (
                f"{storage.url} is the root of a trainer's run (writer {found.epoch}); a DCP "
                "checkpoint needs a directory of its own"
            )
            raise ConfigError(msg)


def _parts(
    ticket: Ticket, results: Sequence[Sequence[WriteResult]]
) -> list[tuple[MetadataIndex, Part]]:
    found = []
    for rank, written in enumerate(results):
        for result in written:
            part = result.storage_data
            if not isinstance(part, Part) or part.attempt != ticket.attempt:
                msg = (
                    f"rank {rank} wrote {result.index.fqn} for another save; use one Writer for "
                    "one save at a time"
                )
                raise PlanError(msg)
            found.append((result.index, part))
    return found


def _manifest(
    storage: Storage,
    where: Place,
    ticket: Ticket,
    metadata: Metadata,
    parts: Sequence[tuple[MetadataIndex, Part]],
) -> StepManifest:
    """Write ``state.json``, check the files' sizes, and describe it all."""
    chunks: dict[str, list[Chunk]] = {}
    values: dict[str, bytes] = {}
    files: dict[str, FileRecord] = {}
    for index, part in parts:
        if part.value is not None:
            values[index.fqn] = part.value
        if part.file is not None and part.chunk is not None:
            files[part.file.name] = part.file
            chunks.setdefault(index.fqn, []).append(part.chunk)
    tensors = []
    for name, planned in sorted(metadata.state_dict_metadata.items()):
        if isinstance(planned, BytesStorageMetadata):
            if name not in values:
                msg = f"entry {name!r} was planned but no rank wrote it"
                raise PlanError(msg)
            continue
        code, shape = dtype_code(planned.properties.dtype), tuple(planned.size)
        # to_bytes() proves that the chunks cover the tensor exactly once.
        tensors.append(TensorRecord(name, code, shape, tuple(chunks.get(name, ()))))
    for record in files.values():
        path = f"{where.base}/{record.name}"
        size = storage.size(path)
        if size != record.size:
            msg = f"{path} has {size} bytes, its rank wrote {record.size}"
            raise DamagedError(msg)
    state = compose(values, metadata.planner_data)
    files[where.name(STATE)] = put_checked(
        storage, where.path(STATE), state, name=where.name(STATE)
    )
    text = json.dumps([[t.name, t.dtype, t.shape, len(t.chunks)] for t in tensors])
    return StepManifest(
        step=STEP,
        epoch=EPOCH,
        attempt=ticket.attempt,
        created=utc_now(),
        writer_version=package_version(),
        world_size=ticket.world,
        mesh=None,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        base=None,
        export=None,
        tensors=tuple(tensors),
        files=tuple(sorted(files.values(), key=lambda record: record.name)),
        adapter_sha256=None,
        policy_version=None,
    )


def _sweep(storage: Storage, attempt: str) -> None:
    """Remove what other tries at this id left: none of them can be committed any more."""
    try:
        for entry in storage.list(STEPS):
            if parse_tmp_step_dir(entry.name) is not None:
                storage.delete_tree(f"{STEPS}/{entry.name}")
        final = step_dir(STEP, EPOCH)
        if not storage.has_rename:
            for entry in storage.list(final):
                if entry.is_dir and entry.name != attempt:
                    storage.delete_tree(f"{final}/{entry.name}")
    except StorageError as error:
        logger.warning("could not remove the remains of earlier tries: %s", error)
