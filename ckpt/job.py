"""One save on its way: what the caller's thread hands to the background, and what it becomes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .arena import Arena, Slot
from .errors import ConfigError
from .handle import SaveHandle
from .manifest import CheckedTensors
from .plan import Layout
from .state import SCHEMA, STATE_FORMAT, encode_state
from .train_state import LiveTensors, TrainState
from .types import MODEL_PREFIX, AdapterExport, BaseIdentity, FileRecord, TensorRecord


@dataclass(slots=True)
class Job:
    """One save on its way through the background thread.

    Attributes:
        seq: number of the call in this manager, equal on all ranks.
        step: step number; None for a publish without one.
        resumable: whether a step is committed (False: a version only).
        publish: whether a version is published.
        planned: whether this call planned anew.
        attempt: id of this try.
        epoch: the writer's epoch.
        layout: who writes what.
        arena: where the slot goes back to.
        slot: the copied bytes; None on a rank that writes no file.
        shared: encoded values that are equal on all ranks, by section.
        mine: this rank's encoded values.
        export: how the adapter is made, or None.
        base: the base model, or None.
        policy_version: the trainer's count of policy updates, or None.
        handle: what the caller holds.
        started: ``time.perf_counter()`` when the call began.
        files: what the ranks wrote, by rank; filled in on rank 0.
        costs: what each rank says of its own part, by rank; filled in on rank 0.
        metrics: the trainer's values for the manifest.
        probe: the trainer's expected outputs for the version's manifest, or None.
        measured: brings the handle's totals up to date; called before a future is settled, so
            that whoever waits for it finds them.
    """

    seq: int
    step: int | None
    resumable: bool
    publish: bool
    planned: bool
    attempt: str
    epoch: int
    layout: Layout
    arena: Arena
    slot: Slot | None
    shared: Mapping[str, bytes]
    mine: bytes
    export: AdapterExport | None
    base: BaseIdentity | None
    policy_version: int | None
    handle: SaveHandle
    started: float
    files: dict[int, FileRecord] = field(default_factory=dict)
    costs: list[Mapping[str, Any]] = field(default_factory=list)
    metrics: Mapping[str, float] = field(default_factory=dict)
    probe: Mapping[str, Any] | None = None
    measured: Callable[[], None] = lambda: None

    @property
    def topic(self) -> str:
        """Where the ranks vote on it."""
        return save_topic(self.seq)


def save_topic(seq: int) -> str:
    """Topic of the vote on a manager's ``seq``-th save."""
    return f"save/{seq}"


def plan_topic(seq: int) -> str:
    """Topic of the planning that the ``seq``-th save may need."""
    return f"plan/{seq}"


def look_topic(seq: int) -> str:
    """Topic on which ranks of a parted state say whether their layout is as it was."""
    return f"look/{seq}"


def subject(
    state: TrainState, *, resumable: bool, publish: bool
) -> tuple[AdapterExport | None, LiveTensors, dict[str, torch.Tensor]]:
    """What a save is about: how the adapter is made, the live state, and the tensors to copy.

    Raises:
        ConfigError: a publish, and nobody said how the adapter is made.
    """
    export = state.export() if publish else state.export_if_any()
    if publish and export is None:
        msg = (
            "publishing needs to know how the PEFT adapter is made: use apply_lora(), whose "
            "models bring it along, or TrainState(export=...)"
        )
        raise ConfigError(msg)
    live = state.live()
    if resumable:
        return export, live, live.tensors
    return export, live, {n: t for n, t in live.tensors.items() if n.startswith(MODEL_PREFIX)}


def encode_values(
    state: TrainState, live: LiveTensors, *, resumable: bool
) -> tuple[dict[str, bytes], bytes]:
    """The JSON half of a snapshot, encoded at once so that nothing can change it.

    Returns:
        The values that are equal on all ranks by section, and this rank's own.
    """
    if not resumable:
        version = {"policy_version": state.policy_version}
        return {"version": encode_state(version)}, encode_state(None)
    shared = {section: encode_state(value) for section, value in state.shared_values(live).items()}
    return shared, encode_state(state.rank_values())


def compose_state(shared: Mapping[str, bytes], ranks: Sequence[str]) -> bytes:
    """``state.json`` from values that were encoded on their own.

    It decodes to ``{"shared": {section: value}, "ranks": [value, ...]}``.
    """

    def value(encoded: str | bytes) -> Any:
        # The codec's documents are plain JSON, so they nest without being decoded.
        return json.loads(encoded)["value"]

    document = {
        "format": STATE_FORMAT,
        "schema": SCHEMA,
        "value": {
            "shared": {section: value(data) for section, data in shared.items()},
            "ranks": [value(data) for data in ranks],
        },
    }
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def file_record_of(value: Mapping[str, Any]) -> FileRecord:
    """A file's record from the form in which it travelled to rank 0."""
    return FileRecord(value["name"], value["size"], value["crc32"], tuple(value["block_crc32"]))


def located(
    records: Sequence[TensorRecord], files: Mapping[int, FileRecord]
) -> tuple[TensorRecord, ...]:
    """Plan records with the names of the files in the place of the writing ranks' numbers."""
    return tuple(
        replace(
            record,
            chunks=tuple(
                replace(chunk, file=files[int(chunk.file)].name) for chunk in record.chunks
            ),
        )
        for record in records
    )


class TensorTable:
    """The tensors of the last manifest, kept for the next one of the same layout.

    With thousands of tensors, naming their files, checking them and encoding them is what a
    commit spends its time on; none of it changes from step to step.
    """

    def __init__(self) -> None:
        self._plan: tuple[TensorRecord, ...] = ()
        self._names: dict[int, str] = {}
        self._records: tuple[TensorRecord, ...] = ()
        self._checked: CheckedTensors | None = None

    def located(
        self, records: tuple[TensorRecord, ...], files: Mapping[int, FileRecord]
    ) -> tuple[TensorRecord, ...]:
        """What :func:`located` gives."""
        names = {rank: file.name for rank, file in files.items()}
        if records is not self._plan or names != self._names:
            self._records = located(records, files)
            self._plan, self._names = records, names
        return self._records

    def checked(
        self, records: tuple[TensorRecord, ...], files: Sequence[FileRecord]
    ) -> CheckedTensors:
        """The records in checked and encoded form.

        Raises:
            PlanError: they break a rule of the format.
        """
        if self._checked is None or not self._checked.fits(records, files):
            self._checked = CheckedTensors.of(records, files)
        return self._checked
