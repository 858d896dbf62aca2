"""Operations that give files: of versions and exports by name, and of a root as it lies there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Depends, Path, Query, Request, Response

from ckpt.errors import DamagedError, NoCheckpoint, ObjectNotFound
from ckpt.job_names import EXPORTS, JOBS, export_dir
from ckpt.layout import (
    ADAPTERS,
    LEASES,
    MANIFEST,
    METRICS,
    PINS,
    REPLICAS,
    STEPS,
    WRITERS,
    path_problem,
    version_dir,
)
from ckpt.peft import WEIGHTS_NAME
from ckpt.types import FileRecord
from ckpt.versions import find_version
from ckpt.wire import API, EntryList, EntryRow

from .answers import RESPONSES
from .auth import Needs, Scope
from .download import Download, send, sha256_of
from .jobs.work import read_export
from .roots import ServedRoot
from .routes_runs import Root, VersionName

OPEN: Final = frozenset({WRITERS, STEPS, ADAPTERS, LEASES, PINS, REPLICAS, METRICS, JOBS, EXPORTS})
"""Directories of a root whose files are given out."""
EXPORT_NAME: Final = r"^step-[0-9]{8}\.w[0-9]{4}-(bfloat16|float16|float32)$"

FileName = Annotated[
    Literal["adapter_model.safetensors", "adapter_config.json", "MANIFEST.json"],
    Path(description="A file of a PEFT directory, or the manifest beside them."),
]
Redirect = Annotated[
    bool, Query(description="Redirect to a signed URL of the store, if the service allows it.")
]
_BYTES: Final[dict[str, Any]] = {"application/octet-stream": {"schema": {"type": "string"}}}
_ANSWERS: Final[dict[int | str, dict[str, Any]]] = {
    200: {"description": "The file.", "content": _BYTES},
    206: {"description": "A range of it.", "content": _BYTES},
    304: {"description": "The caller has it."},
    307: {"description": "To a signed URL of the store."},
    416: {"description": "There are no such bytes."},
}

_FILE: Final[dict[str, Any]] = {"responses": _ANSWERS, "response_class": Response}

router = APIRouter(
    prefix=API,
    tags=["files"],
    responses=RESPONSES,
    dependencies=[Depends(Needs(Scope.read))],
)


@router.get(
    "/runs/{run}/versions/{version}/files/{file}", responses=_ANSWERS, response_class=Response
)
async def download_version(
    request: Request, root: Root, version: VersionName, file: FileName, redirect: Redirect = False
) -> Response:
    """A file of a version, verified; `ETag` is its SHA-256, and one `Range` is served."""
    found = await root.call(_of_version, root, version, file)
    return await send(request, root, found, redirect=redirect)


@router.head(
    "/runs/{run}/versions/{version}/files/{file}", responses=_ANSWERS, response_class=Response
)
async def look_at_version(
    request: Request, root: Root, version: VersionName, file: FileName
) -> Response:
    """Size and SHA-256 of a file of a version."""
    return await send(request, root, await root.call(_of_version, root, version, file))


def _of_version(root: ServedRoot, version: str, file: str) -> Download:
    entry = find_version(root.storage, version)
    manifest = entry.manifest
    if manifest is None:
        if entry.state == "damaged":
            raise DamagedError(f"version {version} is damaged: {entry.problem}")
        raise NoCheckpoint(f"version {version} of {root.url} was never committed")
    directory = version_dir(entry.run, entry.number)
    return _download(root, directory, file, manifest.files, manifest.adapter_sha256)


@router.get(
    "/runs/{run}/exports/{export}/files/{file}", responses=_ANSWERS, response_class=Response
)
async def download_export(
    request: Request,
    root: Root,
    export: Annotated[str, Path(pattern=EXPORT_NAME)],
    file: FileName,
    redirect: Redirect = False,
) -> Response:
    """A file of an adapter that a job exported; as those of versions."""
    found = await root.call(_of_export, root, export, file)
    return await send(request, root, found, redirect=redirect)


def _of_export(root: ServedRoot, name: str, file: str) -> Download:
    made = read_export(root.storage, name)
    return _download(root, export_dir(name), file, made.files, made.adapter_sha256)


def _download(
    root: ServedRoot, directory: str, file: str, files: Sequence[FileRecord], sha256: str
) -> Download:
    path = f"{directory}/{file}"
    if file == MANIFEST:
        size, digest = sha256_of(root, path)
        return Download(path, size, digest, immutable=True)
    record = next(record for record in files if record.name == file)
    digest = sha256 if file == WEIGHTS_NAME else sha256_of(root, path)[1]
    return Download(path, record.size, digest, record, immutable=True)


@router.get("/runs/{run}/files/{path:path}", **_FILE)
async def read_file(request: Request, root: Root, path: str) -> Response:
    """A file of the root as it lies there, for a client that verifies it by its manifest."""
    return await send(request, root, await root.call(_as_it_lies, root, path))


@router.head("/runs/{run}/files/{path:path}", **_FILE)
async def look_at_file(request: Request, root: Root, path: str) -> Response:
    """Size of a file of the root."""
    return await send(request, root, await root.call(_as_it_lies, root, path))


def _as_it_lies(root: ServedRoot, path: str) -> Download:
    _confine(path)
    return Download(path, root.storage.size(path))


@router.get("/runs/{run}/entries/{path:path}")
async def list_directory(root: Root, path: str) -> EntryList:
    """What lies in a directory of the root, by name; a missing one is empty."""
    return await root.call(_entries, root, path)


def _entries(root: ServedRoot, path: str) -> EntryList:
    _confine(path)
    found = root.storage.list(path)
    return EntryList(
        tuple(
            EntryRow(item.name, item.is_dir, item.size)
            for item in found
            if not item.name.startswith(".")
        )
    )


def _confine(path: str) -> None:
    """Refuse what is no path of a served directory.

    Raises:
        ObjectNotFound: also for what exists beside them: nobody learns whether it does.
    """
    parts = path.split("/")
    hidden = any(part.startswith(".") for part in parts)
    if path_problem(path) is not None or parts[0] not in OPEN or hidden:
        raise ObjectNotFound(
            f"paths lie below {', '.join(sorted(OPEN))}; unfinished work is not served"
        )
