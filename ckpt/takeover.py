"""Warm start: the values of a PEFT adapter in a live state, as the beginning of a new run.

A PEFT directory has no optimizer state, schedule or data position, and its names are PEFT's. It is
read backwards through the live state's own export rules, each rank its own rows, and nothing
live changes before every rank has checked all it needs.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, Final

import torch
import torch.distributed as dist

from .adapter_file import open_adapter
from .adapter_fit import KeyMap, check_base, fit
from .adapter_values import adapter_values
from .arena import local_tensor
from .asked import PARTED, compare, refuse
from .errors import CkptError, ConfigError, PlanError, StateError
from .peft import CONFIG_NAME, WEIGHTS_NAME
from .rendezvous import join
from .stages import held_by_nobody
from .storage import Storage, open_storage
from .train_state import TrainState, export_of
from .types import MODEL_PREFIX, AdapterExport
from .vote import Board, RemoteFailure

logger = logging.getLogger(__name__)

_SHOWN: Final = 5


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What a warm start took.

    Attributes:
        url: the directory, without credentials.
        digest: SHA-256 over its configuration, the weights' header and the manifest.
        version: the name of the published version that it is, or None for a bare directory.
        verified: whether the bytes were verified against checksums; only a version has these.
        dtypes: the file's, e.g. ``("BF16",)``.
        notes: what could not be compared.
    """

    url: str
    digest: str
    version: str | None
    verified: bool
    dtypes: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """Which adapter is wanted, and what may differ.

    Attributes:
        url: a PEFT directory: a path, or a URL of any store.
        export: how the live state becomes a PEFT adapter; by default the state is asked.
        keymap: renames the directory's keys before they are compared.
        rescale: fold a scaling (``alpha / r``) that is not the live one into B.
        any_base: do not compare the base models.
        storage_options: for the directory's store.
    """

    url: str | PathLike[str]
    export: AdapterExport | Mapping[str, Any] | None = None
    keymap: KeyMap | None = None
    rescale: bool = False
    any_base: bool = False
    storage_options: Mapping[str, Any] | None = None


def warm_start(
    state: TrainState,
    url: str | PathLike[str],
    *,
    export: AdapterExport | Mapping[str, Any] | None = None,
    keymap: KeyMap | None = None,
    rescale: bool = False,
    any_base: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    timeout: float = 300.0,
) -> WarmStart:
    """Bring the values of a PEFT adapter into a live state, without a manager.

    Every rank of the group calls this. Afterwards the model computes what the adapter's
    own model computed; the optimizer is left as it is, which should be new.

    Args:
        state: the live state.
        url: a PEFT directory, or a published version's: a path, or a URL of any store.
        export: how the live state becomes a PEFT adapter, if not as its model says.
        keymap: renames the directory's keys before they are compared.
        rescale: fold a scaling (``alpha / r``) that is not the live one into B.
        any_base: do not compare the base models.
        storage_options: for the directory's store (never stored or logged).
        process_group: the ranks; the default group if None.
        timeout: seconds that rank 0 waits for a rank's answer after its own is in.

    Returns:
        What was taken.

    Raises:
        ConfigError, PlanError, ObjectNotFound, DamagedError, StateError, BaseMismatch,
            NonFiniteError, StorageError, SaveAborted: see :func:`take_over`; nothing was changed.
    """
    if not timeout > 0:
        msg = f"timeout must be a positive number of seconds, got {timeout!r}"
        raise ConfigError(msg)
    ranks = join(process_group, timeout)
    board = Board(ranks.stores[0], ranks.rank, ranks.world, timeout)
    source = Source(url, export, keymap, rescale, any_base, storage_options)
    try:
        return take_over(board, "warm", state, source)
    finally:
        board.farewell(timeout)
        ranks.release()


def take_over(board: Board, topic: str, state: TrainState, source: Source) -> WarmStart:
    """Agree on an adapter, check it on every rank, then copy its values into place.

    Args:
        board: access to the other ranks; all of them call this.
        topic: a topic that no other exchange has.
        state: the live state.
        source: which adapter.

    Raises:
        ConfigError: the export, the keymap or the adapter's configuration cannot work.
        PlanError: ranks ask for different adapters, or read different ones.
        ObjectNotFound: no adapter is there.
        DamagedError: bytes that do not parse or do not verify.
        StateError: what is missing, unexpected, of another shape, rank or scaling, by name.
        BaseMismatch: the adapter was trained over another base model.
        NonFiniteError: a value that is NaN or infinite.
        StorageError: the store failed.
        SaveAborted: another rank failed or did not answer.
    """
    try:
        storage = open_storage(source.url, source.storage_options)
    except CkptError as error:
        refuse(board, topic, error)
        raise
    # Before the ranks meet and again after the reading: a replacement in between shows on one side.
    stamp = _stamp(storage)
    wanted = {"url": storage.url, "rescale": source.rescale, "any_base": source.any_base}
    wanted[PARTED] = state.parted
    board.answer(f"{topic}/asked", wanted)
    if board.rank == 0:
        try:
            compare(board, topic)
        except (CkptError, RemoteFailure) as error:
            raise board.abort(f"{topic}/0/proposal", error).rebuild(keep=True) from error
        board.decide(f"{topic}/0/proposal", None)
    else:
        verdict = board.verdict(f"{topic}/0/proposal")
        if verdict.failure is not None:
            raise verdict.failure.rebuild(keep=True)
    try:
        taken, targets, values, elsewhere = _stage(board, storage, state, source)
        if _stamp(storage) != stamp:
            msg = f"the adapter in {storage.url} was replaced while it was read; begin again"
            raise PlanError(msg)
        board.answer(f"{topic}/check", {"digest": taken.digest, "elsewhere": elsewhere})
    except CkptError as error:
        board.fail(f"{topic}/check", error)
        _settle(board, topic, error)
        raise
    finally:
        storage.close()
    _settle(board, topic, None)
    with torch.no_grad():
        for name, value in values.items():
            local_tensor(targets[name]).copy_(value)
    for note in taken.notes:
        logger.warning("warm start from %s: %s", taken.url, note)
    return taken


def _stamp(storage: Storage) -> list[tuple[int, int, int] | None]:
    """What tells two files of one name apart on a file system, since a bare one has no checksum."""
    found: list[tuple[int, int, int] | None] = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        path = storage.local_path(name)
        if path is None or not path.exists():
            found.append(None)
            continue
        known = path.stat()
        found.append((known.st_ino, known.st_mtime_ns, known.st_size))
    return found


def _settle(board: Board, topic: str, own: CkptError | None) -> None:
    """Return only if every rank has staged the same adapter; this rank's own error comes first."""
    if board.rank == 0:
        try:
            answers = board.gather(f"{topic}/check")
            for rank, answer in enumerate(answers):
                if answer["digest"] != answers[0]["digest"]:
                    msg = f"ranks 0 and {rank} read different adapters; is it being replaced?"
                    raise PlanError(msg)
            nowhere = held_by_nobody([answer["elsewhere"] for answer in answers])
            if nowhere:
                msg = f"no rank holds {', '.join(nowhere[:_SHOWN])}, which export rules name"
                raise StateError(msg)
            board.decide(f"{topic}/apply", None)
        except (CkptError, RemoteFailure) as error:
            failure = board.abort(f"{topic}/apply", error)
            raise (own or failure.rebuild(keep=True)) from error
    else:
        verdict = board.verdict(f"{topic}/apply")
        if verdict.failure is not None:
            raise own or verdict.failure.rebuild(keep=True)


def _stage(
    board: Board, storage: Storage, state: TrainState, source: Source
) -> tuple[WarmStart, dict[str, torch.Tensor], dict[str, torch.Tensor], list[str]]:
    """Read and check all that this rank needs; nothing live changes.

    The last value names the sources of export rules that another rank of a parted state must hold.
    """
    export = state.export() if source.export is None else export_of(source.export)
    if export is None:
        msg = (
            "the state says nowhere how its tensors become a PEFT adapter, so one cannot be read "
            "backwards: use a model of apply_lora(), or pass export=..."
        )
        raise ConfigError(msg)
    file = open_adapter(storage)
    notes = []
    if not source.any_base:
        note = check_base(file, state.base)
        notes += [] if note is None else [note]
    live = state.live()
    targets = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in live.tensors.items()
        if name.startswith(MODEL_PREFIX) and tensor.is_floating_point()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    elsewhere: list[str] = []
    if state.parted:
        elsewhere = list(dict.fromkeys(r.source for r in export.rules if r.source not in shapes))
    matches = fit(
        file,
        export,
        shapes,
        keymap=source.keymap,
        rescale=source.rescale,
        elsewhere=frozenset(elsewhere),
    )
    # Of a parted state every rank looks at the padding of what it holds: nobody else may hold it.
    share = {"rank": 0, "world": 1} if state.parted else {"rank": board.rank, "world": board.world}
    values = adapter_values(file, matches, targets, **share)
    manifest = file.manifest
    taken = WarmStart(
        url=storage.url,
        digest=file.digest,
        version=None if manifest is None else manifest.name,
        verified=manifest is not None,
        dtypes=tuple(sorted({entry.dtype for entry in file.tensors.values()})),
        notes=tuple(notes),
    )
    return taken, targets, values, elsewhere
