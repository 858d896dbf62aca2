"""What a root holds: its steps and in which state each one is, and checks of their files.

Nothing here changes a root. The states are

- ``committed``: the manifest verifies, every file is there with its size, and the step is
  in the lineage, so that a restore may choose it;
- ``abandoned``: whole as well, but a later writer resumed from before it;
- ``damaged``: the manifest does not verify, or a file is missing or has another size;
- ``incomplete``: no manifest; its writer is at work or died (object stores only).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

from .checksum import block_range, verify_block
from .errors import DamagedError, NoCheckpoint, ObjectNotFound
from .layout import MANIFEST, STEPS, WRITERS, parse_step_dir, parse_writer, step_dir, writer_path
from .lineage import chain_end, committed_lineage
from .manifest import StepManifest, WriterRecord
from .storage.base import Storage
from .types import FileRecord

log = logging.getLogger(__name__)

StepState: TypeAlias = Literal["committed", "abandoned", "damaged", "incomplete"]

_READABLE: Final = ("committed", "abandoned")


@dataclass(frozen=True, slots=True)
class StepEntry:
    """One step directory.

    Attributes:
        step: step number, from the directory's name.
        epoch: the writer's epoch, from the directory's name.
        path: the directory, relative to the root.
        state: see the module's text.
        manifest: its verified manifest, or None.
        problem: why it is damaged or incomplete, or None.
    """

    step: int
    epoch: int
    path: str
    state: StepState
    manifest: StepManifest | None
    problem: str | None = None

    @property
    def bytes(self) -> int | None:
        """Size of the step's files without the manifest, or None if that is not known."""
        return None if self.manifest is None else sum(file.size for file in self.manifest.files)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that does not verify: in which file, which 8 MiB block (or None), and what."""

    file: str
    block: int | None
    message: str


class Lineage(NamedTuple):
    """What the writers' records say about the steps of a root.

    Attributes:
        steps: (step, epoch) of those that a restore may choose from, newest first.
        hidden: older ones of which a damaged or lost record does not let anybody say whether
            they belong to these or were left behind.
    """

    steps: list[tuple[int, int]]
    hidden: frozenset[tuple[int, int]]


def read_writers(storage: Storage) -> list[WriterRecord]:
    """Every writer's record, oldest first.

    Raises:
        DamagedError: a record that does not verify; without it the lineage is not known.
    """
    records = []
    for entry in storage.list(WRITERS):
        epoch = parse_writer(entry.name)
        if epoch is None or entry.is_dir:
            continue
        records.append(_read_writer(storage, epoch))
    return records


def _read_writer(storage: Storage, epoch: int) -> WriterRecord:
    path = writer_path(epoch)
    where = f"{storage.url}/{path}"
    record = WriterRecord.from_bytes(storage.read(path), where)
    if record.epoch != epoch:
        raise DamagedError(f"{where} holds the record of epoch {record.epoch}")
    return record


def read_lineage(storage: Storage, found: Collection[tuple[int, int]]) -> Lineage:
    """The steps that a restore may choose from, also where a writer's record is damaged or lost.

    That costs the run no step of that writer: that they are newer than those of older writers is
    known from the epoch in their own manifests. Only where that writer had resumed is not known
    any more, so nothing behind its steps counts; a warning says so.

    Args:
        storage: the root.
        found: (step, epoch) of its step directories.

    Raises:
        DamagedError: a damaged record hides which steps are the newest ones.
    """
    records: dict[int, WriterRecord] = {}
    broken: dict[int, str] = {}
    for entry in storage.list(WRITERS):
        epoch = parse_writer(entry.name)
        if epoch is None or entry.is_dir:
            continue
        try:
            records[epoch] = _read_writer(storage, epoch)
        except DamagedError as error:
            broken[epoch] = str(error)
    kept = list(found)
    if broken or any(epoch not in records for _step, epoch in found):
        # A directory's name alone proves nothing: anybody may have made it.
        kept = [pair for pair in found if pair[1] in records or _has_manifest(storage, *pair)]
        for epoch in {epoch for _step, epoch in kept} - records.keys() - broken.keys():
            broken[epoch] = f"{storage.url}/{writer_path(epoch)} is missing"
    unknown = [WriterRecord(epoch, None, None, "", 0, "", "") for epoch in broken]
    steps = committed_lineage([*records.values(), *unknown], kept)
    head = max((*records, *broken), default=0)
    if head in broken and not any(epoch == head for _step, epoch in steps):
        msg = (
            f"{broken[head]}; that writer saved nothing and where it resumed is not known. Delete "
            "the record to go on from the newest step of the writers before it"
        )
        raise DamagedError(msg)
    for epoch, problem in sorted(broken.items()):
        log.warning("%s; what lies behind the steps of writer %d does not count", problem, epoch)
    end = chain_end(records, head)
    hidden = set() if end in records else {pair for pair in found if pair[1] < end}
    return Lineage(steps, frozenset(hidden.difference(steps)))


def check_writers(storage: Storage) -> Iterator[Problem]:
    """The writers' records that do not verify, or are missing though the writer saved steps."""
    listed = (parse_writer(entry.name) for entry in storage.list(WRITERS) if not entry.is_dir)
    known = {epoch for epoch in listed if epoch is not None}
    for epoch in sorted(known):
        try:
            _read_writer(storage, epoch)
        except DamagedError as error:
            yield Problem(writer_path(epoch), None, str(error))
    orphans = [pair for pair in step_dirs(storage) if pair[1] not in known]
    for epoch in sorted({pair[1] for pair in orphans if _has_manifest(storage, *pair)}):
        path = writer_path(epoch)
        yield Problem(path, None, f"{storage.url}/{path} is missing")


def _has_manifest(storage: Storage, step: int, epoch: int) -> bool:
    """Whether a directory holds the manifest of the step that its name says."""
    path = f"{step_dir(step, epoch)}/{MANIFEST}"
    try:
        manifest = StepManifest.from_bytes(storage.read(path), f"{storage.url}/{path}")
    except (ObjectNotFound, DamagedError):
        return False
    return (manifest.step, manifest.epoch) == (step, epoch)


def list_steps(storage: Storage) -> list[StepEntry]:
    """Every step directory of a root, by step and epoch, oldest first.

    Reads every manifest and asks for the size of every file, but reads no tensor.

    Raises:
        DamagedError: a writer's record is damaged.
        StorageError: the store failed.
    """
    found = step_dirs(storage)
    lineage = set(read_lineage(storage, found).steps)
    return [step_entry(storage, step, epoch, (step, epoch) in lineage) for step, epoch in found]


def find_step(storage: Storage, step: int | None = None, *, epoch: int | None = None) -> StepEntry:
    """The step that a request means.

    Args:
        storage: the root.
        step: its number, or None for the newest one that is whole.
        epoch: the writer's epoch; only needed to get at an abandoned step.

    Raises:
        NoCheckpoint: there is no such step; says what there is.
        DamagedError: the step that was asked for by number is damaged.
    """
    found = step_dirs(storage)
    lineage = read_lineage(storage, found).steps
    if step is None:
        return _newest(storage, lineage)
    tries = [pair for pair in found if pair[0] == step and (epoch is None or pair[1] == epoch)]
    counted = [pair for pair in lineage if pair in tries]  # the newest writer's try first
    if epoch is None and tries and not counted:
        writers = ", ".join(str(pair[1]) for pair in tries)
        msg = (
            f"step {step} of {storage.url} was abandoned: a later writer resumed from before it; "
            f"name its epoch to take it all the same (epochs with that step: {writers})"
        )
        raise NoCheckpoint(msg)
    if not tries:
        raise NoCheckpoint(_no_such_step(storage, step, epoch, lineage))
    pair = (counted or tries)[0]
    entry = step_entry(storage, *pair, pair in lineage)
    if entry.state == "incomplete":
        raise NoCheckpoint(f"step {step} of {storage.url} was never committed: {entry.problem}")
    if entry.state not in _READABLE:
        raise DamagedError(f"step {step} of {storage.url} is damaged: {entry.problem}")
    return entry


def _newest(storage: Storage, lineage: Sequence[tuple[int, int]]) -> StepEntry:
    for step, epoch in lineage:
        entry = step_entry(storage, step, epoch, True)
        if entry.state == "committed":
            return entry
        log.warning("passing over %s step %d: %s", entry.state, step, entry.problem)
    if lineage:
        raise NoCheckpoint(f"none of the {len(lineage)} step(s) in {storage.url} is whole")
    raise NoCheckpoint(f"no steps in {storage.url}")


def _no_such_step(
    storage: Storage, step: int, epoch: int | None, lineage: Sequence[tuple[int, int]]
) -> str:
    have = ", ".join(str(number) for number, _epoch in lineage[:8]) or "none"
    more = ", …" if len(lineage) > 8 else ""
    writer = "" if epoch is None else f" by writer {epoch}"
    return f"no step {step}{writer} in {storage.url}; newest steps: {have}{more}"


def step_dirs(storage: Storage) -> list[tuple[int, int]]:
    """(step, epoch) of every step directory of a root, committed or not."""
    parsed = (parse_step_dir(entry.name) for entry in storage.list(STEPS) if entry.is_dir)
    return sorted(pair for pair in parsed if pair is not None)


def step_entry(storage: Storage, step: int, epoch: int, in_lineage: bool) -> StepEntry:
    """What lies in a step's directory: its manifest is read, its files' sizes asked for.

    Args:
        storage: the root.
        step: step number.
        epoch: the writer's epoch.
        in_lineage: whether a restore may choose it; says ``committed`` from ``abandoned``.

    Raises:
        StorageError: the store failed.
    """
    path = step_dir(step, epoch)
    where = f"{storage.url}/{path}/{MANIFEST}"
    try:
        data = storage.read(f"{path}/{MANIFEST}")
    except ObjectNotFound:
        problem = f"no {MANIFEST}"
        # A POSIX step appears whole, by one rename, so a missing manifest was lost later on.
        state: StepState = "damaged" if storage.has_rename else "incomplete"
        return StepEntry(step, epoch, path, state, None, problem)
    try:
        manifest = StepManifest.from_bytes(data, where)
    except DamagedError as error:
        return StepEntry(step, epoch, path, "damaged", None, str(error))
    if (manifest.step, manifest.epoch) != (step, epoch):
        problem = f"its manifest is that of step {manifest.step}, writer {manifest.epoch}"
        return StepEntry(step, epoch, path, "damaged", None, problem)
    problems = check_sizes(storage, path, manifest.files)
    if problems:
        return StepEntry(step, epoch, path, "damaged", manifest, problems[0].message)
    state = "committed" if in_lineage else "abandoned"
    return StepEntry(step, epoch, path, state, manifest)


def check_sizes(storage: Storage, directory: str, files: Sequence[FileRecord]) -> list[Problem]:
    """The files of a directory that are missing or have another size than recorded."""
    problems = []
    for file in files:
        where = f"{storage.url}/{directory}/{file.name}"
        try:
            size = storage.size(f"{directory}/{file.name}")
        except ObjectNotFound:
            problems.append(Problem(file.name, None, f"{where} is missing"))
            continue
        if size != file.size:
            message = f"{where} has {size} bytes, the manifest says {file.size}"
            problems.append(Problem(file.name, None, message))
    return problems


def check_step(
    storage: Storage, entry: StepEntry, on_bytes: Callable[[int], object] | None = None
) -> Iterator[Problem]:
    """Read every byte of a step and compare; an incomplete step has nothing to compare."""
    if entry.manifest is not None:
        yield from check_bytes(storage, entry.path, entry.manifest.files, on_bytes=on_bytes)
    elif entry.state == "damaged" and entry.problem is not None:
        yield Problem(MANIFEST, None, entry.problem)


def check_bytes(
    storage: Storage,
    directory: str,
    files: Sequence[FileRecord],
    *,
    sha256: Mapping[str, str] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> Iterator[Problem]:
    """Read every byte of the files and compare; one block is in memory at a time.

    Args:
        storage: the root.
        directory: where the files lie, relative to the root.
        files: as the manifest records them.
        sha256: hexadecimal SHA-256 by file name, for the files that have one.
        on_bytes: told the size of every block that was read.
    """
    digests = sha256 or {}
    wrong = check_sizes(storage, directory, files)
    yield from wrong
    unreadable = {problem.file for problem in wrong}
    for file in files:
        if file.name in unreadable:
            continue
        path = f"{directory}/{file.name}"
        digest = hashlib.sha256()
        whole = True
        for index in range(len(file.block_crc32)):
            data = storage.read(path, *block_range(file, index))
            digest.update(data)
            if on_bytes is not None:
                on_bytes(len(data))
            try:
                verify_block(file, index, data, f"{storage.url}/{path}")
            except DamagedError as error:
                whole = False
                yield Problem(file.name, index, str(error))
        want = digests.get(file.name)
        if whole and want is not None and digest.hexdigest() != want:
            message = f"{storage.url}/{path} has SHA-256 {digest.hexdigest()}, want {want}"
            yield Problem(file.name, None, message)
