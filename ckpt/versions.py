"""Published versions as readers see them: list, find, verify, copy, delete.

How one comes into being is :mod:`ckpt.publish`'s part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from .catalog import Problem, check_bytes, check_sizes
from .errors import DamagedError, NoCheckpoint, ObjectNotFound
from .holds import remove_unless_held
from .layout import (
    ADAPTERS,
    MANIFEST,
    check_name,
    claim_path,
    parse_claim,
    parse_version_name,
    version_dir,
    version_name,
)
from .manifest import VersionManifest
from .peft import CONFIG_NAME, WEIGHTS_NAME, WeightsFile, WrittenAdapter, write_adapter_dir
from .storage import Entry, Storage, verified_blocks

_FILES: Final = frozenset({CONFIG_NAME, WEIGHTS_NAME})
_WEIGHT_SUFFIXES: Final = (".safetensors", ".bin", ".pt")

VersionState: TypeAlias = Literal["committed", "damaged", "claimed", "unread"]


@dataclass(frozen=True, slots=True)
class VersionEntry:
    """One version number of a run, as storage shows it.

    Attributes:
        name: ``<run>-v<number>``.
        run: the run's name.
        number: its number.
        path: its directory, relative to the root.
        state: ``committed``; ``damaged`` (does not verify); ``claimed`` (no manifest: its
            writer is at work or died, and the number stays unused); or ``unread`` (retention knows
            of it by its name alone).
        manifest: its verified manifest, or None.
        problem: why it is damaged, or None.
    """

    name: str
    run: str
    number: int
    path: str
    state: VersionState
    manifest: VersionManifest | None
    problem: str | None = None

    @property
    def bytes(self) -> int | None:
        """Size of the two adapter files, or None if that is not known."""
        return None if self.manifest is None else sum(file.size for file in self.manifest.files)


def list_versions(storage: Storage, run: str | None = None) -> list[VersionEntry]:
    """Every version number that was ever taken, by run and number.

    Reads the manifests and asks for the sizes of the files; :func:`read_version` reads all bytes.

    Args:
        storage: the run's root.
        run: only the versions of that name, or None for all.
    """
    return [
        version_entry(storage, *pair) if has_dir else _claim_entry(*pair)
        for pair, has_dir in version_names(storage, run).items()
    ]


def version_names(storage: Storage, run: str | None = None) -> dict[tuple[str, int], bool]:
    """Every (run, number) that was ever taken, in order, by one listing and without a read.

    Args:
        storage: the run's root.
        run: only the versions of that name, or None for all.

    Returns:
        For each whether it has a directory; one that has only its claim was never committed.
    """
    return names_in(storage.list(ADAPTERS), run)


def names_in(entries: Iterable[Entry], run: str | None = None) -> dict[tuple[str, int], bool]:
    """As :func:`version_names`, of a listing of ``adapters/`` that is at hand."""
    found: dict[tuple[str, int], bool] = {}
    for entry in entries:
        pair = parse_version_name(entry.name) if entry.is_dir else parse_claim(entry.name)
        if pair is not None and run in (None, pair[0]):
            found[pair] = found.get(pair, False) or entry.is_dir
    return dict(sorted(found.items()))


def _claim_entry(run: str, number: int) -> VersionEntry:
    path = version_dir(run, number)
    return VersionEntry(version_name(run, number), run, number, path, "claimed", None)


def version_entry(storage: Storage, run: str, number: int) -> VersionEntry:
    """What lies in the directory of a version: its manifest is read, its files' sizes asked for.

    Raises:
        ConfigError: the run's name or the number is none.
        StorageError: the store failed.
    """
    name, path = version_name(run, number), version_dir(run, number)
    try:
        manifest = _read_manifest(storage, name, path)
    except ObjectNotFound:
        if not storage.has_rename:
            return _claim_entry(run, number)
        problem = f"{storage.url}/{path} has no {MANIFEST}"
        return VersionEntry(name, run, number, path, "damaged", None, problem)
    except DamagedError as error:
        return VersionEntry(name, run, number, path, "damaged", None, str(error))
    problems = check_sizes(storage, path, manifest.files)
    if problems:
        return VersionEntry(name, run, number, path, "damaged", manifest, problems[0].message)
    return VersionEntry(name, run, number, path, "committed", manifest)


def _read_manifest(storage: Storage, name: str, path: str) -> VersionManifest:
    where = f"{storage.url}/{path}/{MANIFEST}"
    manifest = VersionManifest.from_bytes(storage.read(f"{path}/{MANIFEST}"), where)
    if manifest.name != name:
        raise DamagedError(f"{where} is that of version {manifest.name}")
    names = {file.name for file in manifest.files}
    if names != _FILES:
        raise DamagedError(f"{where} lists {sorted(names)}, want {CONFIG_NAME} and {WEIGHTS_NAME}")
    return manifest


def check_version(
    storage: Storage, entry: VersionEntry, on_bytes: Callable[[int], object] | None = None
) -> Iterator[Problem]:
    """Read every byte of a version and compare with CRC32s and SHA-256."""
    if entry.manifest is None:
        if entry.problem is not None:
            yield Problem(MANIFEST, None, entry.problem)
        return
    for item in storage.list(entry.path):
        if item.name not in _FILES and item.name.endswith(_WEIGHT_SUFFIXES):
            where = f"{storage.url}/{entry.path}/{item.name}"
            yield Problem(item.name, None, f"{where} is foreign, and engines would load it")
    digests = {WEIGHTS_NAME: entry.manifest.adapter_sha256}
    yield from check_bytes(
        storage, entry.path, entry.manifest.files, sha256=digests, on_bytes=on_bytes
    )


def read_version(storage: Storage, name: str) -> VersionManifest:
    """The manifest of a published version all of whose bytes verify.

    Raises:
        ConfigError: the name is no safe name.
        NoCheckpoint: no such version was committed.
        DamagedError: its manifest or a byte of its files does not verify.
        StorageError: the store failed.
    """
    entry = find_version(storage, name)
    for problem in check_version(storage, entry):
        raise DamagedError(f"version {name} is damaged: {problem.message}")
    if entry.manifest is None:
        raise NoCheckpoint(f"version {name} of {storage.url} was claimed but never committed")
    return entry.manifest


def find_version(storage: Storage, name: str) -> VersionEntry:
    """The entry of a version by its exact name.

    Raises:
        ConfigError: the name is no safe name.
        NoCheckpoint: nothing has that name.
    """
    check_name("version name", name)
    pair = parse_version_name(name)
    if pair is not None:
        if storage.list(version_dir(*pair)):
            return version_entry(storage, *pair)
        if storage.exists(claim_path(*pair)):
            return _claim_entry(*pair)
    msg = f"no version {name!r} in {storage.url}; versions are named like 'run7-v00000042'"
    raise NoCheckpoint(msg)


def delete_version(storage: Storage, name: str) -> str | None:
    """Delete a version unless it is pinned or in use; its number is not given out again.

    The claim goes too, unless it is the run's highest: that one keeps the next number above it.

    Returns:
        None once it is deleted, or what keeps it.

    Raises:
        ConfigError, NoCheckpoint: as :func:`find_version`.
        StorageError: the store failed.
    """
    entry = find_version(storage, name)
    higher = any(
        pair is not None and pair[0] == entry.run and pair[1] > entry.number
        for pair in (parse_claim(item.name) for item in storage.list(ADAPTERS))
    )
    if storage.list(entry.path):
        held = remove_unless_held(storage, name)
        if held is not None:
            return held
    if higher:
        storage.delete(claim_path(entry.run, entry.number))
    return None


def export_version(
    storage: Storage,
    name: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    out_storage_options: Mapping[str, Any] | None = None,
) -> tuple[VersionManifest, WrittenAdapter]:
    """Copy a published version to a plain PEFT directory elsewhere, byte for byte.

    Args:
        storage: the run's root.
        name: the version's exact name.
        out: the directory to make, local or remote; readers see all of it or nothing.
        overwrite: replace an adapter that is at ``out`` already.
        out_storage_options: for the store of ``out``.

    Raises:
        ConfigError, NoCheckpoint, DamagedError, StorageError: as :func:`read_version`.
        AlreadyExists: something is at ``out``.
    """
    manifest = read_version(storage, name)
    path = find_version(storage, name).path
    files = {file.name: file for file in manifest.files}
    weights = files[WEIGHTS_NAME]
    config = json.loads(storage.read(f"{path}/{CONFIG_NAME}"))
    stream = WeightsFile(weights.size, verified_blocks(storage, f"{path}/{WEIGHTS_NAME}", weights))
    written = write_adapter_dir(
        out, stream, config, overwrite=overwrite, storage_options=out_storage_options
    )
    return manifest, written
