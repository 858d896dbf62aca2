"""A stock DCP checkpoint as a committed step, from which a ``CheckpointManager`` resumes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckpt.foreign import ForeignStep, ForeignTensor, commit_foreign
from ckpt.manifest import StepManifest
from ckpt.storage import open_storage

from .mapping import Choices, map_names
from .stock import StockCheckpoint


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did.

    Attributes:
        manifest: the committed step's.
        skipped: names that were left out, because the caller said so or the importer does.
        entries: number of non-tensor entries of the source.
    """

    manifest: StepManifest
    skipped: tuple[str, ...]
    entries: int


def import_checkpoint(
    source: str,
    root: str,
    *,
    step: int = 0,
    choices: Choices | None = None,
    source_options: Mapping[str, Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """Convert a checkpoint of stock DCP into the first step of a run.

    One tensor is in memory at a time. Where the checkpoint says nothing about the ranks' random
    number generators (stock DCP never does), they begin from seed 0.

    Args:
        source: directory or URL with the ``.metadata``.
        root: root of the run; it must not hold steps.
        step: number that the step gets.
        choices: how names are understood; see :mod:`ckpt.dcp.mapping`.
        source_options: for the source's store.
        storage_options: for the root's store.

    Raises:
        NoCheckpoint: the source is no such checkpoint.
        ConfigError: the root holds steps already, or a choice matches nothing.
        StateError: something in the source has no place in a step, or is not plain data.
        DamagedError: the source cannot be read.
        StorageError: a store failed.
    """
    stock = StockCheckpoint(open_storage(source, source_options))
    return import_stock(stock, root, step, choices or Choices(), storage_options=storage_options)


def import_stock(
    stock: StockCheckpoint,
    root: str,
    step: int,
    choices: Choices,
    *,
    ranks: list[Any] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Imported:
    """The same, of a checkpoint that is open already.

    Args:
        stock: the source.
        root: root of the run; it must not hold steps.
        step: number that the step gets.
        choices: how names are understood.
        ranks: what each rank had, if it is known from elsewhere than the source.
        storage_options: for the root's store.

    Raises:
        CkptError: as :func:`import_checkpoint`.
    """
    mapped = map_names(stock, choices)
    tensors = {
        target: ForeignTensor(
            stock.tensors[origin].dtype,
            stock.tensors[origin].shape,
            functools.partial(stock.read_tensor, origin),
        )
        for target, origin in mapped.tensors.items()
    }
    foreign = ForeignStep(tensors, mapped.shared, ranks or mapped.ranks)
    manifest = commit_foreign(open_storage(root, storage_options), step, foreign)
    return Imported(manifest, tuple(mapped.skipped), len(stock.entries))
