"""Published versions: immutable PEFT directories under numbers that only grow.

A version is made in three moves: *claim* a number by an exclusive create, *write* the two adapter
files, *commit* with ``MANIFEST.json``. A number whose writer failed or died between them is
never given to anybody again, so no name ever stands for two adapters.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from .about import package_version
from .adapter_plan import AdapterPlans
from .catalog import find_step
from .claim import claim_number
from .commit import newest_epoch
from .consolidate import stream_adapter
from .envelope import plain_json, utc_now
from .errors import (
    CommitUnknown,
    ConfigError,
    NoCheckpoint,
    PublishError,
    StorageError,
    Superseded,
)
from .layout import (
    MANIFEST,
    WRITERS,
    check_run_name,
    new_attempt,
    parse_version_name,
    parse_writer,
    tmp_version_dir,
    version_dir,
    version_name,
)
from .lint import check_publishable
from .manifest import VersionManifest
from .peft import WeightsFile, write_adapter_files
from .source import StepSource, TensorSource
from .storage.base import Storage
from .types import AdapterExport, BaseIdentity
from .versions import list_versions, read_version

__all__ = ["list_versions", "publish_step", "publish_version", "read_version"]

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
    after: int | None = None,
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
        after: the number that this publisher took last, if it has taken one.

    Raises:
        ConfigError: the run's name is no safe name.
        PublishError: anything else; names the version and the cause. No version exists then,
            unless the cause is :class:`CommitUnknown`: :func:`read_version` settles that.
    """
    check_run_name(run)
    authority = authority or storage
    # What is asked of the store while the files are on their way: each request takes its time.
    beside = ThreadPoolExecutor(1, thread_name_prefix="ckpt-publish")
    claiming: Future[int] | None = None
    try:
        plan = (plans or AdapterPlans()).plan(export, source.records, dtype)
        check_publishable(plan.header, plan.peft_config)
        claiming = beside.submit(claim_number, authority, run, epoch, attempt, after=after)
        current: list[Future[None]] = []
        written = write_adapter_files(
            storage,
            lambda: _work_dir(storage, run, claiming.result(), attempt),
            WeightsFile(plan.size, stream_adapter(plan, source)),
            plan.peft_config,
            # A writer that another has followed is told so before the version exists.
            then=lambda: current.append(beside.submit(_refuse_superseded, authority, epoch)),
        )
        for check in current:
            check.result()
        number = claiming.result()
        manifest = VersionManifest(
            number=number,
            name=version_name(run, number),
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
        directory = _work_dir(storage, run, number, attempt)
        _commit(storage, directory, version_dir(run, number), manifest.to_bytes())
        return manifest
    except Exception as error:
        claimed = _claimed(run, claiming)
        # Nothing may be removed while the manifest's fate is open: the version may be live.
        if claimed is not None and not isinstance(error, CommitUnknown):
            _remove_remains(storage, claimed, attempt)
        what = f"version {claimed}" if claimed else f"the next version of {run!r}"
        cause = str(error) or type(error).__name__
        raise PublishError(f"{what} was not published in {storage.url}: {cause}") from error
    finally:
        beside.shutdown()


def _claimed(run: str, claiming: Future[int] | None) -> str | None:
    """The name whose number was taken, also by a claim that is still under way."""
    if claiming is None or claiming.exception() is not None:
        return None
    return version_name(run, claiming.result())


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


def publish_step(
    storage: Storage,
    step: int | None = None,
    *,
    run: str,
    epoch: int | None = None,
    dtype: str = "bfloat16",
) -> VersionManifest:
    """Publish a committed step under the run's next number, without a model.

    No writer epoch is claimed, so a trainer that works on the same root is not disturbed. The
    version carries no probe: without the model nobody knows its outputs.

    Args:
        storage: the run's root.
        step: the step's number, or None for the newest whole one.
        run: first part of the version's name.
        epoch: the step's writer, to take an abandoned step.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.

    Raises:
        ConfigError: the run's name is no safe name.
        NoCheckpoint: no such step, or it carries no adapter export.
        DamagedError: the step does not verify.
        PublishError: as :func:`publish_version`.
        StorageError: the store failed.
    """
    check_run_name(run)
    entry = find_step(storage, step, epoch=epoch)
    manifest = entry.manifest
    if manifest is None or manifest.export is None:
        msg = f"step {entry.step} of {storage.url} has no adapter export, so it cannot be published"
        raise NoCheckpoint(f"{msg}; save it from a model with LoRA applied")
    return publish_version(
        storage,
        run=run,
        export=manifest.export,
        source=StepSource(storage, entry.path, manifest),
        dtype=dtype,
        step=manifest.step,
        policy_version=manifest.policy_version,
        epoch=max(1, newest_epoch(storage)),
        attempt=new_attempt(),
        base=manifest.base,
    )


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
