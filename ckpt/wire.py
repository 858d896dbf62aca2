"""What the service and its clients say to each other: plain, frozen, JSON-ready records.

They are the contract of the HTTP API; its OpenAPI description is made from them. Members are only
ever added. A client passes over members that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

API: Final = "/v1"
"""First part of every path of the API."""

StepState: TypeAlias = Literal["committed", "abandoned", "damaged", "incomplete"]
VersionState: TypeAlias = Literal["committed", "damaged", "claimed", "unread"]
JobKind: TypeAlias = Literal["export", "verify", "prune"]
JobState: TypeAlias = Literal["waiting", "running", "succeeded", "failed", "cancelled"]

FINISHED: Final[tuple[JobState, ...]] = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True, slots=True)
class ErrorRow:
    """What went wrong: the name of an error of :mod:`ckpt.errors`, or of a rule of HTTP."""

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """The body of every answer that is not a success."""

    error: ErrorRow


@dataclass(frozen=True, slots=True)
class RunRow:
    """A root that is served.

    Attributes:
        run: its name in this service.
        url: where it lies, without credentials.
        has_rename: whether that is a file system.
        run_names: first parts of the names of the versions in it.
        latest: name of the newest whole version, by run name.
        newest_step: number of the newest step directory of the current lineage, or None.
        problem: why it cannot be read at this moment, or None.
    """

    run: str
    url: str
    has_rename: bool
    run_names: tuple[str, ...] = ()
    latest: Mapping[str, str] = field(default_factory=dict)
    newest_step: int | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class RunList:
    """The roots of a service, by name."""

    runs: tuple[RunRow, ...]


@dataclass(frozen=True, slots=True)
class FileRow:
    """A file of a step or version: path in its directory, size, CRC32 as 8 hexadecimal digits."""

    name: str
    bytes: int
    crc32: str


@dataclass(frozen=True, slots=True)
class ChunkRow:
    """A piece of a tensor: place and extent in the global tensor, and the bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor of a step: ``model.<name>`` or ``optim.<name>.<key>``, with its pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    chunks: tuple[ChunkRow, ...]


@dataclass(frozen=True, slots=True)
class BaseRow:
    """The frozen model that an adapter belongs to."""

    name: str
    config_hash: str


@dataclass(frozen=True, slots=True)
class VerifiedRow:
    """When every byte of a step or version was last read and compared.

    Attributes:
        at: ISO 8601, UTC.
        ok: whether all of it verified.
        job: the job that did it.
    """

    at: str
    ok: bool
    job: str


@dataclass(frozen=True, slots=True)
class StepRow:
    """A step directory as a listing shows it; None where no manifest says it.

    Attributes:
        step: its number.
        epoch: the writer's epoch.
        state: see :mod:`ckpt.catalog`.
        path: relative to the root.
        bytes: of all files but the manifest.
        files: how many.
        tensors: how many.
        world_size: ranks that saved.
        policy_version: the trainer's count of policy updates.
        has_adapter: whether a PEFT adapter can be exported.
        created: ISO 8601, UTC.
        metrics: what the trainer gave at the save.
        problem: why it is damaged or incomplete.
        pinned: whether a person keeps it.
        verified: the last reading of all its bytes that this service knows of.
    """

    step: int
    epoch: int
    state: StepState
    path: str
    bytes: int | None
    files: int | None
    tensors: int | None
    world_size: int | None
    policy_version: int | None
    has_adapter: bool | None
    created: str | None
    metrics: Mapping[str, float]
    problem: str | None
    pinned: bool = False
    verified: VerifiedRow | None = None


@dataclass(frozen=True, slots=True)
class StepList:
    """A page of steps, newest first.

    Attributes:
        steps: the page.
        total: step directories in the root.
        next: what to give as ``before`` for the page after this one, or None at the end.
    """

    steps: tuple[StepRow, ...]
    total: int
    next: str | None


@dataclass(frozen=True, slots=True)
class StepDetail:
    """A step down to its tensors and their pieces."""

    summary: StepRow
    attempt: str
    writer_version: str
    mesh: Mapping[str, Any] | None
    fingerprint: str
    base: BaseRow | None
    peft_config: Mapping[str, Any] | None
    files: tuple[FileRow, ...]
    tensors: tuple[TensorRow, ...]


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A published version as a listing shows it; None where no manifest says it.

    Attributes:
        name: ``<run>-v<number>``.
        run_name: first part of it.
        number: the number.
        state: see :mod:`ckpt.versions`.
        path: relative to the root.
        bytes: of the two adapter files.
        step: the training step it is from.
        policy_version: the trainer's count of policy updates.
        epoch: the writer's epoch.
        dtype: of its tensors.
        adapter_sha256: of ``adapter_model.safetensors``; the ETag of a download.
        created: ISO 8601, UTC.
        problem: why it is damaged.
        has_probe: whether it says what an engine must answer once it has it loaded.
        held: what keeps it from being pruned, or None.
        verified: the last reading of all its bytes that this service knows of.
    """

    name: str
    run_name: str
    number: int
    state: VersionState
    path: str
    bytes: int | None
    step: int | None
    policy_version: int | None
    epoch: int | None
    dtype: str | None
    adapter_sha256: str | None
    created: str | None
    problem: str | None
    has_probe: bool = False
    held: str | None = None
    verified: VerifiedRow | None = None


@dataclass(frozen=True, slots=True)
class VersionList:
    """A page of versions, newest first.

    Attributes:
        versions: the page.
        total: numbers of versions that were ever taken and are still known.
        next: what to give as ``before`` for the page after this one, or None at the end.
    """

    versions: tuple[VersionRow, ...]
    total: int
    next: str | None


@dataclass(frozen=True, slots=True)
class VersionDetail:
    """A committed version.

    Attributes:
        summary: as in a listing.
        files: the two adapter files.
        base: the base model.
        probe: what an engine must answer once it has it loaded, or None.
        manifest: the sealed manifest as it lies on storage, so that a client can verify it.
    """

    summary: VersionRow
    files: tuple[FileRow, ...]
    base: BaseRow | None
    probe: Mapping[str, Any] | None
    manifest: str


@dataclass(frozen=True, slots=True)
class LeaseRow:
    """A version in use: by whom, the last sign of life, until when, and whether it still holds."""

    version: str
    holder: str
    renewed: str
    expires: str | None
    live: bool


@dataclass(frozen=True, slots=True)
class LeaseList:
    """Leases, by version and holder."""

    leases: tuple[LeaseRow, ...]


@dataclass(frozen=True, slots=True)
class EntryRow:
    """One immediate child of a directory of a root."""

    name: str
    is_dir: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class EntryList:
    """What lies in a directory of a root, by name."""

    entries: tuple[EntryRow, ...]


@dataclass(frozen=True, slots=True)
class PinRow:
    """A step or version that stays until it is unpinned."""

    name: str
    note: str
    host: str
    created: str


@dataclass(frozen=True, slots=True)
class PinList:
    """What is pinned, by name."""

    pins: tuple[PinRow, ...]


@dataclass(frozen=True, slots=True)
class ExportRow:
    """An adapter that a job exported: of which step, in which dtype, and its files."""

    name: str
    step: int
    epoch: int
    dtype: str
    created: str
    adapter_sha256: str
    files: tuple[FileRow, ...]


@dataclass(frozen=True, slots=True)
class ExportList:
    """Exported adapters, by name."""

    exports: tuple[ExportRow, ...]


@dataclass(frozen=True, slots=True)
class JobRow:
    """A piece of work on a root.

    Attributes:
        id: its name; ids sort by time.
        kind: what is done.
        state: ``waiting`` also covers a job whose service died and that another will take up.
        params: what was asked for.
        created: ISO 8601, UTC.
        by: name of the token that asked.
        attempt: how often it was begun.
        done: how much is done, in the unit of ``total``.
        total: bytes or entries in all, or None while it is not known.
        finished: ISO 8601, UTC, or None.
        result: what came of it, by kind.
        error: why it failed.
    """

    id: str
    kind: JobKind
    state: JobState
    params: Mapping[str, Any]
    created: str
    by: str
    attempt: int = 0
    done: int = 0
    total: int | None = None
    finished: str | None = None
    result: Mapping[str, Any] | None = None
    error: ErrorRow | None = None


@dataclass(frozen=True, slots=True)
class JobList:
    """Jobs of a root, newest first."""

    jobs: tuple[JobRow, ...]


@dataclass(frozen=True, slots=True)
class Health:
    """Whether something works, and why not."""

    ok: bool
    problems: Mapping[str, str] = field(default_factory=dict)
