"""What each kind of job does.

Every kind may be killed at any instant and begun again: what it makes appears whole or not at all,
what it deletes is named in the approved plan, and a second go finishes what the first one left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ckpt.adapter_plan import plan_adapter
from ckpt.catalog import (
    Problem,
    StepEntry,
    check_sizes,
    check_step,
    check_writers,
    find_step,
    list_steps,
)
from ckpt.consolidate import stream_adapter
from ckpt.envelope import Fields, canonical_json, seal, unseal, utc_now
from ckpt.errors import ConfigError, DamagedError, NoCheckpoint, ObjectNotFound
from ckpt.holds import finish_removal, remove_unless_held
from ckpt.job_names import EXPORTS, export_dir, export_name, tmp_export_dir
from ckpt.layout import MANIFEST, TMP_PREFIX, step_name
from ckpt.peft import WeightsFile, write_adapter_files
from ckpt.record_codec import file_json, parse_files
from ckpt.retain import review
from ckpt.source import StepSource
from ckpt.storage import Buffer, Storage
from ckpt.storage.faultpoints import hit
from ckpt.timeline import names_whole
from ckpt.timeline_store import record_removal
from ckpt.types import FileRecord, Retention
from ckpt.version_retain import VersionFate, apply_fate, review_versions
from ckpt.versions import VersionEntry, check_version, find_version, list_versions

from .records import Job, JobBook

EXPORT_FORMAT: Final = "ckpt.export"
SCHEMA: Final = 1
CACHE_BYTES: Final = 64 * 1024 * 1024
_SHOWN_PROBLEMS: Final = 20


@dataclass(slots=True)
class Progress:
    """How far a job is. Whoever works adds to it, and is stopped by it.

    Attributes:
        check: raises when the job must not go on.
        done: how much is done.
        total: of how much, or None while it is not known.
    """

    check: Callable[[], None]
    done: int = 0
    total: int | None = None

    def add(self, count: int) -> None:
        """So much more is done; raises what ``check`` raises."""
        self.done += count
        self.check()


@dataclass(frozen=True, slots=True)
class Go:
    """One go at a job: the root's book, the job, the number of the try, and how far it is."""

    book: JobBook
    job: Job
    number: int
    progress: Progress

    @property
    def storage(self) -> Storage:
        """The root."""
        return self.book.storage


def work(go: Go) -> Mapping[str, Any]:
    """Do a job; what came of it.

    Raises:
        CkptError: why it cannot be done; whatever the progress's check raises passes through.
    """
    hit("job.begun")
    result = {"export": export, "verify": verify, "prune": prune}[go.job.kind](go)
    hit("job.before_result")
    return result


def clean(go: Go) -> None:
    """Remove what a job that will not be finished has left half-made."""
    if go.job.kind == "export":
        _remove_remains(go)
        _remove_half(go)


# --- export -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Exported:
    """An adapter in ``exports/``, as its sealed manifest describes it."""

    name: str
    step: int
    epoch: int
    dtype: str
    created: str
    adapter_sha256: str
    files: tuple[FileRecord, ...]

    def to_bytes(self) -> bytes:
        """The file ``MANIFEST.json``."""
        body = {
            "name": self.name,
            "step": self.step,
            "epoch": self.epoch,
            "dtype": self.dtype,
            "created": self.created,
            "adapter_sha256": self.adapter_sha256,
            "files": [file_json(file) for file in self.files],
        }
        return seal(EXPORT_FORMAT, SCHEMA, body)


def read_export(storage: Storage, name: str) -> Exported:
    """An adapter that a job exported.

    Raises:
        ConfigError: that is no export's name.
        NoCheckpoint: there is none of that name.
        DamagedError: its manifest does not verify.
    """
    path = f"{export_dir(name)}/{MANIFEST}"
    where = f"{storage.url}/{path}"
    try:
        fields = Fields(unseal(storage.read(path), EXPORT_FORMAT, SCHEMA, where), where)
    except ObjectNotFound:
        raise NoCheckpoint(f"there is no export {name} in {storage.url}") from None
    found = Exported(
        name=fields.text("name", 100),
        step=fields.integer("step"),
        epoch=fields.integer("epoch"),
        dtype=fields.text("dtype", 20),
        created=fields.timestamp("created"),
        adapter_sha256=fields.sha256("adapter_sha256"),
        files=parse_files(fields),
    )
    fields.done()
    if found.name != name:
        fields.refuse("name", f"must be {name}", found.name)
    return found


def export(go: Go) -> Mapping[str, Any]:
    """Consolidate the adapter of a step into ``exports/``; the same step gives the same bytes."""
    storage, params = go.storage, go.job.params
    entry = find_step(storage, params["step"], epoch=params["epoch"])
    name = export_name(entry.step, entry.epoch, params["dtype"])
    _remove_remains(go)
    try:
        made = read_export(storage, name)
        whole = not check_sizes(storage, export_dir(name), made.files)
    except (NoCheckpoint, DamagedError):
        whole = False
    if not whole:
        made = _write_export(go, entry, name, params["dtype"])
    return {
        "name": name,
        "step": made.step,
        "epoch": made.epoch,
        "dtype": made.dtype,
        "adapter_sha256": made.adapter_sha256,
        "files": [{"name": f.name, "bytes": f.size, "crc32": f"{f.crc32:08x}"} for f in made.files],
    }


def _write_export(go: Go, entry: StepEntry, name: str, dtype: str) -> Exported:
    storage, manifest = go.storage, entry.manifest
    if manifest is None or manifest.export is None:
        msg = f"step {entry.step} has no adapter export, so it cannot be written as a PEFT adapter"
        raise NoCheckpoint(msg)
    source = StepSource(storage, entry.path, manifest, cache_bytes=CACHE_BYTES)
    plan = plan_adapter(manifest.export, source.records, dtype)
    go.progress.total = plan.size
    # Where there is no rename, the files lie under their name at once, and the manifest makes them
    # an export. Two that write there write the same bytes.
    target = export_dir(name)
    place = tmp_export_dir(go.job.id, go.number) if storage.has_rename else target
    chunks = _counted(stream_adapter(plan, source), go.progress)
    weights = WeightsFile(plan.size, chunks)
    written = write_adapter_files(storage, place, weights, plan.peft_config)
    hit("job.unit")
    made = Exported(name, entry.step, entry.epoch, dtype, utc_now(), written.sha256, written.files)
    storage.put(f"{place}/{MANIFEST}", made.to_bytes())
    if place != target:
        storage.delete_tree(target)  # one whose manifest does not verify: nobody could read it
        storage.rename_dir(place, target)
    return made


def _counted(chunks: Iterable[Buffer], progress: Progress) -> Iterator[Buffer]:
    for chunk in chunks:
        yield chunk
        progress.add(memoryview(chunk).nbytes)


def _remove_remains(go: Go) -> None:
    """What earlier tries of this job left."""
    for item in go.storage.list(EXPORTS):
        if item.name.startswith(f"{TMP_PREFIX}{go.job.id}-"):
            go.storage.delete_tree(f"{EXPORTS}/{item.name}")


def _remove_half(go: Go) -> None:
    """What lies under the export's name and is none; only where nobody else may be writing it."""
    others = (job for job in go.book.unfinished(set()) if job != go.job.id)
    if go.storage.has_rename or any(go.book.read(job).kind == "export" for job in others):
        return
    params = go.job.params
    path = export_dir(export_name(params["step"], params["epoch"], params["dtype"]))
    if not go.storage.exists(f"{path}/{MANIFEST}"):
        go.storage.delete_tree(path)


# --- verify -------------------------------------------------------------------------------------


def verify(go: Go) -> Mapping[str, Any]:
    """Read every byte of all steps and versions, or of one, and compare."""
    storage, params = go.storage, go.job.params
    steps, versions = _chosen(storage, params)
    entries: list[StepEntry | VersionEntry] = [*steps, *versions]
    go.progress.total = sum(entry.bytes or 0 for entry in entries)
    ok: dict[str, bool] = {}
    damaged = []
    checks: list[tuple[str, str, Iterator[Problem]]] = [
        (step_name(s.step, s.epoch), s.path, check_step(storage, s, go.progress.add)) for s in steps
    ]
    checks += [(v.name, v.path, check_version(storage, v, go.progress.add)) for v in versions]
    for name, path, problems in checks:
        found = list(problems)
        hit("job.unit")
        go.progress.add(0)
        ok[name] = not found
        if found:
            damaged.append({"path": path, "problems": _problem_rows(found)})
    if not {"step", "version"} & params.keys():
        damaged += [
            {"path": p.file, "problems": _problem_rows([p])} for p in check_writers(storage)
        ]
    return {"ok": not damaged, "checked": ok, "damaged": damaged, "bytes": go.progress.done}


def _problem_rows(problems: list[Problem]) -> list[dict[str, Any]]:
    rows = [{"file": p.file, "block": p.block, "message": p.message} for p in problems]
    return rows[:_SHOWN_PROBLEMS]


def _chosen(
    storage: Storage, params: Mapping[str, Any]
) -> tuple[list[StepEntry], list[VersionEntry]]:
    if "version" in params:
        return [], [find_version(storage, str(params["version"]))]
    steps = list_steps(storage)
    if "step" not in params:
        return steps, [v for v in list_versions(storage) if v.state != "claimed"]
    epoch = params.get("epoch")
    tries = [s for s in steps if s.step == params["step"] and epoch in (None, s.epoch)]
    if not tries:
        raise NoCheckpoint(f"no step {params['step']} in {storage.url}")
    return tries, []


# --- prune --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fallen:
    """A step or version that a rule gives up, with what deletes it."""

    name: str
    remove: Callable[[], str | None]


def prune(go: Go) -> Mapping[str, Any]:
    """Delete what no rule keeps; without ``confirm``, only say what that would be."""
    storage, params = go.storage, go.job.params
    rows, falls = review_root(storage, params)
    plan = plan_hash(params, [fall.name for fall in falls])
    go.progress.total = len(falls)
    if "confirm" not in params:
        return {"dry_run": True, "plan": plan, "entries": rows}
    approved = go.book.read_note(go.job.id, "plan")
    if approved is None:
        if plan != params["confirm"]:
            msg = "the root changed since the dry run; look at a new one and confirm its plan"
            raise ConfigError(msg)
        approved = {"names": [fall.name for fall in falls]}
        go.book.note(go.job.id, "plan", approved)
    names = set(approved["names"])
    if go.number > 1:
        for name in sorted(names):
            finish_removal(storage, name)
    fates: dict[str, str | None] = {}
    for fall in falls:
        if fall.name in names:
            go.progress.check()
            fates[fall.name] = fall.remove()
            hit("job.unit")
            go.progress.add(1)
    for row in rows:
        held = fates.get(row["name"])
        if held is not None:
            row.update(keep=True, reason=held)
    done = [name for name, held in fates.items() if held is None]
    seen = {row["name"] for row in rows}
    gone = sorted(names - seen)  # by an earlier try
    fallen = sorted(name for name in {*done, *gone} if names_whole(name))
    record_removal(storage, "ckpt serve", fallen)
    return {"dry_run": False, "plan": params["confirm"], "entries": rows, "gone_before": gone}


def review_root(
    storage: Storage, params: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[Fallen]]:
    """What the rules of a prune would do: a row for everything, and what falls."""
    rows: list[dict[str, Any]] = []
    falls: list[Fallen] = []
    if params.get("keep_latest") is not None:
        rule = Retention(
            latest=params["keep_latest"],
            every=params.get("every"),
            best=params.get("best"),
            metric=params.get("metric"),
            mode=params.get("mode", "max"),
        )
        for entry, fate in review(storage, rule):
            name = step_name(entry.step, entry.epoch)
            rows.append(_row(name, entry, keep=fate.keep, reason=fate.reason))
            if not fate.keep:
                falls.append(Fallen(name, _remover(storage, name)))
    if params.get("keep_versions") is not None:
        for version in review_versions(storage, params["keep_versions"], params.get("run_name")):
            name = version.entry.path.rpartition("/")[2]
            rows.append(_row(name, version.entry, keep=version.keep, reason=version.reason))
            if not version.keep:
                falls.append(Fallen(name, _version_remover(storage, version)))
    return rows, falls


def _remover(storage: Storage, name: str) -> Callable[[], str | None]:
    return lambda: remove_unless_held(storage, name)


def _version_remover(storage: Storage, fate: VersionFate) -> Callable[[], str | None]:
    return lambda: apply_fate(storage, fate)


def _row(name: str, entry: StepEntry | VersionEntry, *, keep: bool, reason: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": entry.path,
        "state": entry.state,
        "bytes": entry.bytes,
        "keep": keep,
        "reason": reason,
    }


def plan_hash(params: Mapping[str, Any], names: Iterable[str]) -> str:
    """What a dry run shows and a prune confirms: the rules and all that they give up."""
    rules = {key: value for key, value in params.items() if key != "confirm"}
    return hashlib.sha256(canonical_json([rules, sorted(names)])).hexdigest()
