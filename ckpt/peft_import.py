"""A PEFT directory from elsewhere as a published version of a run.

A version, not a step: an adapter has no optimizer state, and its names are PEFT's, not the
trainer's. To train on from one, its tensors are loaded into the model instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .commit import newest_epoch
from .errors import ConfigError
from .layout import check_run_name, new_attempt
from .manifest import VersionManifest
from .peft import local_directory, read_adapter
from .publish import publish_version
from .source import MemorySource
from .storage import open_storage
from .types import AdapterExport, TensorRule

_DTYPES = frozenset({"bfloat16", "float16", "float32"})


def import_adapter(
    source: str,
    root: str,
    *,
    run: str,
    dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VersionManifest:
    """Publish the adapter in a directory as the run's next version.

    No writer epoch is claimed, so a trainer that works on the same root is not disturbed.

    Args:
        source: a local PEFT directory.
        root: root of the run.
        run: first part of the version's name.
        dtype: what the tensors are cast to; as they are if None.
        storage_options: for the root's store.

    Raises:
        ConfigError: the source is a URL, or its tensors have several dtypes and none is named.
        ObjectNotFound: it is not there, or lacks one of the two files.
        DamagedError: a file does not parse.
        StateError: it holds several adapters.
        PublishError: the adapter is not one that engines load; names the cause.
        StorageError: the store failed.
    """
    directory = local_directory(source)
    if directory is None:
        raise ConfigError(f"{source} is a URL; copy the PEFT directory to this machine first")
    config, tensors = read_adapter(directory)
    return publish_tensors(
        config,
        tensors,
        root,
        where=str(directory),
        run=run,
        dtype=dtype,
        storage_options=storage_options,
    )


def publish_tensors(
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    root: str,
    *,
    where: str,
    run: str,
    dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> VersionManifest:
    """Publish an adapter that was read already, in whichever form, as the run's next version.

    Args:
        config: content of ``adapter_config.json``.
        tensors: by PEFT key.
        root: root of the run.
        where: what the tensors came from, for messages.
        run: first part of the version's name.
        dtype: what the tensors are cast to; as they are if None.
        storage_options: for the root's store.

    Raises:
        CkptError: as :func:`import_adapter`.
    """
    check_run_name(run)
    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if dtype is None:
        if len(found) != 1 or found[0] not in _DTYPES:
            msg = f"the tensors in {where} are {', '.join(found) or 'none'}; name a --dtype"
            raise ConfigError(msg)
        dtype = found[0]
    storage = open_storage(root, storage_options)
    return publish_version(
        storage,
        run=run,
        export=AdapterExport(config, tuple(TensorRule(key, key) for key in sorted(tensors))),
        source=MemorySource(tensors),
        dtype=dtype,
        step=None,
        policy_version=None,
        epoch=max(1, newest_epoch(storage)),
        attempt=new_attempt(),
        base=None,
    )
