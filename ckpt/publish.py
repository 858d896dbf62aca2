"""Published versions: immutable PEFT directories under numbers that only grow.

A version is made in three moves: *claim* a number by an exclusive create, *write* the two adapter
files, *commit* with ``MANIFEST.json``. A number whose writer failed or died between them is
never given to anybody again, so no name ever stands for two adapters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
from collections.abc import Iterable, Mapping
from typing import Any, Final

from .about import package_version
from .adapter_plan import AdapterPlans
from .consolidate import stream_adapter
from .envelope import plain_json, seal, utc_now
from .errors import (
    AlreadyExists,
    CommitUnknown,
    ConfigError,
    PublishError,
    StorageError,
    Superseded,
)
from .layout import (
    ADAPTERS,
    MANIFEST,
    MAX_VERSION,
    WRITERS,
    check_run_name,
    claim_path,
    new_attempt,
    parse_claim,
    parse_version_name,
    parse_writer,
    tmp_version_dir,
    version_dir,
    version_name,
)
from .lint import check_publishable
from .manifest import VersionManifest
from .peft import WeightsFile, write_adapter_files
from .source import TensorSource
from .storage.base import Entry, Storage
from .types import AdapterExport, BaseIdentity
from .versions import list_versions, read_version

__all__ = ["list_versions", "publish_version", "read_version"]

CLAIM_FORMAT: Final = "ckpt.claim"
CLAIM_SCHEMA: Final = 1

log = logging.getLogger(__name__)


def publish_version(
    storage: Storage,
    *,
    run: str,
    export: AdapterExport,
    source: TensorSource,
    dtype: str = "bfloat16",
    step: int | None,
    policy_version: int | None,
    epoch: int,
    attempt: str,
    base: BaseIdentity | None,
    probe: Mapping[str, Any] | None = None,
    authority: Storage | None = None,
    plans: AdapterPlans | None = None,
) -> VersionManifest:
    """Publish an adapter under the run's next number.

    Args:
        storage: the run's root.
        run: its name, the first part of the version's name.
        export: PEFT configuration and rules.
        source: the tensors.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
        step: the training step the tensors are from, if any.
        policy_version: the trainer's count of policy updates, if any.
        epoch: the writer's epoch; a writer that was superseded may not publish.
        attempt: id of this try.
        base: the base model the adapter belongs to.
        probe: outputs that an engine with this version loaded must show.
        authority: where numbers are claimed and writers are known, if that is not ``storage``: the
            root, when ``storage`` is a tier from which the version is mirrored to it.
        plans: remembers the plan from one publish to the next.

    Raises:
        ConfigError: the run's name is no safe name.
        PublishError: anything else; names the version and the cause. No version exists then,
            unless the cause is :class:`CommitUnknown`: :func:`read_version` settles that.
    """
    check_run_name(run)
    claimed: str | None = None
    authority = authority or storage
    try:
        plan = (plans or AdapterPlans()).plan(export, source.records, dtype)
        check_publishable(plan.header, export.peft_config)
        number = _claim(authority, run, epoch, attempt)
        claimed = version_name(run, number)
        weights = WeightsFile(plan.size, stream_adapter(plan, source))
        directory = _work_dir(storage, run, number, attempt)
        written = write_adapter_files(storage, directory, weights, export.peft_config)
        manifest = VersionManifest(
            number=number,
            name=claimed,
            step=step,
            policy_version=policy_version,
            epoch=epoch,
            attempt=attempt,
            created=utc_now(),
            writer_version=package_version(),
            adapter_sha256=written.sha256,
            dtype=dtype,
            base=base,
            files=written.files,
            probe=probe,
        )
        _refuse_superseded(authority, epoch)
        _commit(storage, directory, version_dir(run, number), manifest.to_bytes())
        return manifest
    except Exception as error:
        # Nothing may be removed while the manifest's fate is open: the version may be live.
        if claimed is not None and not isinstance(error, CommitUnknown):
            _remove_remains(storage, claimed, attempt)
        what = f"version {claimed}" if claimed else f"the next version of {run!r}"
        cause = str(error) or type(error).__name__
        raise PublishError(f"{what} was not published in {storage.url}: {cause}") from error


def check_probe(probe: Mapping[str, Any] | None, *, publish: bool) -> dict[str, Any] | None:
    """A version's expected outputs in the form that its manifest holds.

    Raises:
        ConfigError: something that JSON does not have, or a probe without a version.
    """
    if probe is None:
        return None
    if not publish:
        msg = "a probe belongs to a version: pass publish=True as well, or no probe"
        raise ConfigError(msg)
    checked: dict[str, Any] = plain_json(probe, "probe")
    try:
        json.dumps(checked, allow_nan=False)
    except ValueError as error:
        msg = "probe holds a number that is NaN or infinite, which no manifest can"
        raise ConfigError(msg) from error
    return checked


def _claim(storage: Storage, run: str, epoch: int, attempt: str) -> int:
    """Take the next number; who loses the race for one tries the one after it."""
    number = 1 + max(_numbers(storage.list(ADAPTERS), run), default=0)
    while number <= MAX_VERSION:
        body = {
            "name": version_name(run, number),
            "epoch": epoch,
            "attempt": attempt,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "created": utc_now(),
            # No two claims have equal bytes, so reading one back tells whose it is.
            "nonce": new_attempt(),
        }
        # An unclear answer may have left a claim of ours behind: that number is lost, not shared.
        with contextlib.suppress(AlreadyExists, CommitUnknown):
            storage.put_new(claim_path(run, number), seal(CLAIM_FORMAT, CLAIM_SCHEMA, body))
            return number
        number += 1
    raise PublishError(f"run {run!r} has used up its {MAX_VERSION} version numbers; rename it")


def _numbers(entries: Iterable[Entry], run: str) -> set[int]:
    """Every number of the run that a claim or a directory shows as taken."""
    parsed = (
        parse_version_name(entry.name) if entry.is_dir else parse_claim(entry.name)
        for entry in entries
    )
    return {pair[1] for pair in parsed if pair is not None and pair[0] == run}


def _work_dir(storage: Storage, run: str, number: int, attempt: str) -> str:
    if storage.has_rename:
        return tmp_version_dir(version_name(run, number), attempt)
    return version_dir(run, number)  # nobody else has the claim, and no manifest shows it yet


def _commit(storage: Storage, directory: str, target: str, manifest: bytes) -> None:
    if storage.has_rename:
        storage.put(f"{directory}/{MANIFEST}", manifest)
        storage.rename_dir(directory, target)
    else:
        storage.put_new(f"{directory}/{MANIFEST}", manifest)


def _refuse_superseded(storage: Storage, epoch: int) -> None:
    epochs = [parse_writer(entry.name) for entry in storage.list(WRITERS)]
    newest = max((number for number in epochs if number is not None), default=epoch)
    if newest > epoch:
        raise Superseded(f"writer {newest} has taken over the run from writer {epoch}")


def _remove_remains(storage: Storage, name: str, attempt: str) -> None:
    parsed = parse_version_name(name)
    if parsed is None:
        return
    directory = _work_dir(storage, *parsed, attempt)
    try:
        storage.delete(f"{directory}/{MANIFEST}")
        storage.delete_tree(directory)
    except StorageError as error:
        # The claim stays and no manifest names them, so the remains do no harm.
        log.warning("cannot remove what is left of version %s: %s", name, error)
