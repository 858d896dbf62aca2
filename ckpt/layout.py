"""Every name that lies on storage, in one place: how it is made, and how it is recognised.

Names are made from checked numbers and parsed strictly: a name that this module did not make
parses to None, so that foreign files are neither read nor deleted. Paths are relative to the
run's root and ``/``-separated.
"""

from __future__ import annotations

import re
import uuid

from .errors import ConfigError

WRITERS = "writers"
STEPS = "steps"
ADAPTERS = "adapters"
LEASES = "leases"
PINS = "pins"
REPLICAS = "replicas"
"""What sidecars say of the engines they look after: hints for people, too."""
METRICS = "metrics"
"""What saves cost and what was deleted: hints for people, which nothing is decided by."""

MANIFEST = "MANIFEST.json"
"""Written last into a step or version; its presence is the commit."""
STATE = "state.json"
TIER = "TIER.json"
"""In a local tier only: its id and the root that it belongs to."""
PART = "PART.json"
"""In a step of a tier that one node has to itself: which of the step's files lie there."""
MIRROR = "mirror"
"""In a local tier only: locks, heartbeat and marks of the uploader."""
LATEST = "LATEST"
"""A hint that is never trusted."""

TMP_PREFIX = ".tmp-"
"""Unfinished work; nothing under such a name is ever read."""
TRASH_PREFIX = ".trash-"
"""A directory on its way out: renamed first, so that a half-deleted one is never seen."""

MAX_STEP = 99_999_999
MAX_VERSION = 99_999_999
MAX_EPOCH = 9_999
MAX_WORLD = 99_999
MAX_NAME = 100

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_ATTEMPT = re.compile(r"[a-z0-9]{4,64}")
_STEP = re.compile(r"step-([0-9]{8})\.w([0-9]{4})")
_TMP_STEP = re.compile(r"\.tmp-([0-9]{8})-([a-z0-9]{4,64})")
_WRITER = re.compile(r"([0-9]{4})\.json")
_SHARD = re.compile(r"shard-([0-9]{5})-of-([0-9]{5})\.safetensors")
_VERSION = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)-v([0-9]{8})")
_TMP_VERSION = re.compile(r"\.tmp-([A-Za-z0-9][A-Za-z0-9_-]*)-[a-z0-9]{4,64}")
_CLAIM_SUFFIX = ".claim.json"
_LEASE_SUFFIX = ".json"
_PIN_SUFFIX = ".json"
_SEGMENT = re.compile(r"([0-9]{13})-([a-z0-9]{4,64})\.json")
_MARK = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_.-]{0,120})\.(?P<outcome>[a-z]+)")


def _number(what: str, value: int, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        msg = f"{what} must be an integer from {low} to {high}, got {value!r}"
        raise ConfigError(msg)
    return value


def check_step(step: int) -> int:
    """The step number itself, if it is one (0 to 99 999 999).

    Raises:
        ConfigError: it is not.
    """
    return _number("step", step, 0, MAX_STEP)


def check_epoch(epoch: int) -> int:
    """The writer epoch itself, if it is one (1 to 9 999).

    Raises:
        ConfigError: it is not.
    """
    return _number("writer epoch", epoch, 1, MAX_EPOCH)


def check_name(what: str, name: str) -> str:
    """A run's, version's or holder's name itself, if it is a safe one.

    Raises:
        ConfigError: it does not match ``[A-Za-z0-9][A-Za-z0-9_-]{0,99}``.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        msg = (
            f"{what} must be 1 to {MAX_NAME} letters, digits, '_' or '-' and start with a letter "
            f"or digit, got {name!r}"
        )
        raise ConfigError(msg)
    return name


def check_run_name(run: str) -> str:
    """A run's name itself, if it is a safe one, also with the number of a version behind it.

    Raises:
        ConfigError: it is no safe name, or too long to name versions after.
    """
    longest = MAX_NAME - len(f"-v{MAX_VERSION}")
    if len(check_name("run name", run)) > longest:
        msg = (
            f"run name must be at most {longest} characters long, which leaves room for the number "
            f"of a version; got {len(run)}: {run!r}"
        )
        raise ConfigError(msg)
    return run


def check_attempt(attempt: str) -> str:
    """The attempt id itself, if it is one (4 to 64 lower-case letters and digits).

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(attempt, str) or not _ATTEMPT.fullmatch(attempt):
        msg = f"attempt must be 4 to 64 lower-case letters or digits, got {attempt!r}"
        raise ConfigError(msg)
    return attempt


def new_attempt() -> str:
    """A fresh attempt id: 32 hexadecimal digits that no other attempt has."""
    return uuid.uuid4().hex


def path_problem(path: object) -> str | None:
    """Why a relative path is not safe to use below a root, or None if it is.

    The same rule holds for paths that callers give and for paths that manifests name.
    """
    if not isinstance(path, str):
        return f"is {type(path).__name__}, not text"
    if not path:
        return "is empty"
    if len(path) > 1024:
        return "is longer than 1024 characters"
    if path.startswith("/"):
        return "is absolute"
    if "\\" in path:
        return "contains a backslash"
    if not path.isprintable():
        return "contains a control or unprintable character"
    for part in path.split("/"):
        if part in {"", ".", ".."}:
            return f"has the component {part!r}"
        if len(part.encode()) > 255:
            return "has a component longer than 255 bytes"
    return None


def writer_path(epoch: int) -> str:
    """``writers/0003.json``: the record of a writer epoch."""
    return f"{WRITERS}/{check_epoch(epoch):04d}.json"


def parse_writer(name: str) -> int | None:
    """The epoch of an entry of ``writers/``, or None for a foreign name."""
    match = _WRITER.fullmatch(name)
    epoch = int(match[1]) if match else 0
    return epoch if epoch >= 1 else None


def step_name(step: int, epoch: int) -> str:
    """``step-00000042.w0003``."""
    return f"step-{check_step(step):08d}.w{check_epoch(epoch):04d}"


def step_dir(step: int, epoch: int) -> str:
    """``steps/step-00000042.w0003``: one immutable step of one writer."""
    return f"{STEPS}/{step_name(step, epoch)}"


def parse_step_dir(path: str) -> tuple[int, int] | None:
    """(step, epoch) of an entry of ``steps/`` (with or without that prefix), or None."""
    match = _STEP.fullmatch(path.removeprefix(f"{STEPS}/"))
    if match is None or int(match[2]) < 1:
        return None
    return int(match[1]), int(match[2])


def tmp_step_dir(step: int, attempt: str) -> str:
    """``steps/.tmp-00000042-<attempt>``: a step that is being written (POSIX)."""
    return f"{STEPS}/{TMP_PREFIX}{check_step(step):08d}-{check_attempt(attempt)}"


def parse_tmp_step_dir(path: str) -> tuple[int, str] | None:
    """(step, attempt) of an unfinished entry of ``steps/``, or None for a foreign name."""
    match = _TMP_STEP.fullmatch(path.removeprefix(f"{STEPS}/"))
    return (int(match[1]), match[2]) if match else None


def trash_path(path: str) -> str:
    """Where a directory is renamed to before it is deleted: ``steps/.trash-step-…``."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/{TRASH_PREFIX}{name}" if parent else f"{TRASH_PREFIX}{name}"


def shard_name(rank: int, world: int) -> str:
    """``shard-00000-of-00002.safetensors``: what one rank of ``world`` holds."""
    _number("world size", world, 1, MAX_WORLD)
    _number("rank", rank, 0, world - 1)
    return f"shard-{rank:05d}-of-{world:05d}.safetensors"


def parse_shard_name(name: str) -> tuple[int, int] | None:
    """(rank, world) of a shard's file name, or None for a foreign name."""
    match = _SHARD.fullmatch(name)
    if match is None or not int(match[1]) < int(match[2]):
        return None
    return int(match[1]), int(match[2])


def version_name(run: str, number: int) -> str:
    """``run7-v00000042``: a published version, a name that is never used twice.

    Raises:
        ConfigError: a bad run name or number.
    """
    check_run_name(run)
    _number("version number", number, 0, MAX_VERSION)
    return f"{run}-v{number:08d}"


def parse_version_name(name: str) -> tuple[str, int] | None:
    """(run, number) of a version's name, or None for a foreign name."""
    match = _VERSION.fullmatch(name)
    if match is None or len(name) > MAX_NAME:
        return None
    return match[1], int(match[2])


def version_dir(run: str, number: int) -> str:
    """``adapters/run7-v00000042``: a plain PEFT directory."""
    return f"{ADAPTERS}/{version_name(run, number)}"


def tmp_version_dir(name: str, attempt: str) -> str:
    """``adapters/.tmp-<version>-<attempt>``: a version that is being written (POSIX)."""
    check_name("version name", name)
    return f"{ADAPTERS}/{TMP_PREFIX}{name}-{check_attempt(attempt)}"


def parse_tmp_version_dir(name: str) -> str | None:
    """The version's name of an unfinished entry of ``adapters/``, or None for a foreign name."""
    match = _TMP_VERSION.fullmatch(name)
    return match[1] if match and parse_version_name(match[1]) is not None else None


def claim_path(run: str, number: int) -> str:
    """``adapters/run7-v00000042.claim.json``: who may write that version."""
    return f"{version_dir(run, number)}{_CLAIM_SUFFIX}"


def parse_claim(name: str) -> tuple[str, int] | None:
    """(run, number) of a claim's file name in ``adapters/``, or None for a foreign name."""
    if not name.endswith(_CLAIM_SUFFIX):
        return None
    return parse_version_name(name.removesuffix(_CLAIM_SUFFIX))


def lease_path(version: str, holder: str) -> str:
    """``leases/<version>/<holder>.json``: a reader that is using a version."""
    check_name("version name", version)
    check_name("lease holder", holder)
    return f"{LEASES}/{version}/{holder}{_LEASE_SUFFIX}"


def parse_lease(version: str, file: str) -> tuple[str, str] | None:
    """(version, holder) of an entry of ``leases/<version>/``, or None for a foreign name."""
    holder = file.removesuffix(_LEASE_SUFFIX)
    if holder == file or not _NAME.fullmatch(holder) or parse_version_name(version) is None:
        return None
    return version, holder


def pin_path(name: str) -> str:
    """``pins/<step or version>.json``: retention leaves what it names alone.

    Raises:
        ConfigError: neither a step's nor a version's name.
    """
    if parse_step_dir(name) is None and parse_version_name(name) is None:
        msg = f"{name!r} names neither a step (step-00000042.w0003) nor a version (run7-v00000042)"
        raise ConfigError(msg)
    return f"{PINS}/{name}{_PIN_SUFFIX}"


def parse_pin(file: str) -> str | None:
    """The step's or version's name of an entry of ``pins/``, or None for a foreign name."""
    name = file.removesuffix(_PIN_SUFFIX)
    known = parse_step_dir(name) is not None or parse_version_name(name) is not None
    return name if name != file and known else None


def replica_path(holder: str) -> str:
    """``replicas/<holder>.json``: what a sidecar says of its engines."""
    return f"{REPLICAS}/{check_name('holder', holder)}{_LEASE_SUFFIX}"


def parse_replica(file: str) -> str | None:
    """The holder of an entry of ``replicas/``, or None for a foreign name."""
    holder = file.removesuffix(_LEASE_SUFFIX)
    return holder if holder != file and _NAME.fullmatch(holder) else None


def segment_path(began_ms: int, writer: str) -> str:
    """``metrics/1764082800000-<id>.json``: what one process told about its saves.

    Args:
        began_ms: milliseconds since 1970 of its beginning, so that names sort by age.
        writer: 4 to 64 lower-case letters or digits that no other process has.
    """
    _number("time in milliseconds", began_ms, 0, 10**13 - 1)
    return f"{METRICS}/{began_ms:013d}-{check_attempt(writer)}.json"


def parse_segment(name: str) -> tuple[int, str] | None:
    """(milliseconds, writer) of an entry of ``metrics/``, or None for a foreign name."""
    match = _SEGMENT.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def target_dir(name: str) -> str:
    """The directory of a step or version by its bare name (``steps/…`` or ``adapters/…``)."""
    return f"{STEPS if parse_step_dir(name) is not None else ADAPTERS}/{name}"


def mark_path(name: str, outcome: str) -> str:
    """``mirror/step-00000042.w0003.mirrored``: what became of a step or version of a tier."""
    return f"{MIRROR}/{name}.{outcome}"


def parse_mark(name: str) -> tuple[str, str] | None:
    """(step or version, outcome) of a mark's file name in ``mirror/``, or None."""
    match = _MARK.fullmatch(name)
    if match is None:
        return None
    known = parse_step_dir(match["name"]) or parse_version_name(match["name"])
    return (match["name"], match["outcome"]) if known else None
