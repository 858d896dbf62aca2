"""PEFT adapter directories: how they are written, read and recognised.

A directory has exactly two files that loaders look at: ``adapter_model.safetensors``
(metadata ``format=pt``, keys in sorted order) and ``adapter_config.json``, written last so that a
watcher that waits for the config never finds half of the weights. How checkpoint tensors become
the weights file is :mod:`ckpt.consolidate`'s part; the rules of keys and configurations are
:mod:`ckpt.peft_config`'s.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .checksum import file_record
from .errors import (
    AlreadyExists,
    ConfigError,
    DamagedError,
    NonFiniteError,
    ObjectNotFound,
    StateError,
    StorageError,
)
from .layout import MANIFEST, TMP_PREFIX, new_attempt
from .peft_config import config_bytes, plain_key
from .storage import open_storage
from .storage.base import ONE_PUT_BYTES, Buffer, Storage
from .storage.exchange import exchange_dirs
from .storage.paths import as_views, collect
from .tally import Tally
from .types import FileRecord

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
LEGACY_WEIGHTS_NAME: Final = "adapter_model.bin"

_OWN_FILES: Final = frozenset(
    {CONFIG_NAME, WEIGHTS_NAME, LEGACY_WEIGHTS_NAME, MANIFEST, "README.md"}
)


def is_lora_adapter_dir(path: str | Path) -> bool:
    """Whether a local directory (or the weights file in one) is a PEFT LoRA adapter.

    True when weights, safetensors or legacy, lie beside an ``adapter_config.json`` that
    says ``"peft_type": "LORA"``.
    """
    directory = Path(path)
    if directory.name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME):
        directory = directory.parent
    if not any((directory / name).is_file() for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME)):
        return False
    try:
        config = _read_config(directory)
    except (ObjectNotFound, DamagedError):
        return False
    return config.get("peft_type") == "LORA"


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read a PEFT adapter from a local directory or from the weights file in one.

    Args:
        path: the directory, or ``adapter_model.safetensors`` / ``adapter_model.bin`` itself. In a
            directory the safetensors file is preferred.

    Returns:
        The configuration as stored, and CPU tensors by PEFT key in the file's dtypes. An adapter
        name inside the keys (``lora_A.default.weight``) is taken out, so that keys always
        have the form that PEFT saves.

    Raises:
        ObjectNotFound: the path or one of the two files is missing.
        DamagedError: a file that does not parse, or a legacy file with anything but tensors.
        StateError: the file holds several adapters, so keys would collide.
    """
    given = Path(path)
    if given.is_dir():
        weights = given / WEIGHTS_NAME
        if not weights.is_file():
            weights = given / LEGACY_WEIGHTS_NAME
        if not weights.is_file():
            msg = (
                f"no adapter weights in {given.resolve()}: expected {WEIGHTS_NAME}"
                f" (or the legacy {LEGACY_WEIGHTS_NAME})"
            )
            raise ObjectNotFound(msg)
    elif given.is_file():
        weights = given
    else:
        msg = (
            f"no adapter at {given.resolve()}: expected a directory with {WEIGHTS_NAME}"
            f" and {CONFIG_NAME}"
        )
        raise ObjectNotFound(msg)
    config = _read_config(weights.parent)
    read = read_legacy_weights if weights.suffix in (".bin", ".pt", ".pth") else _read_safetensors
    return config, _without_adapter_name(read(weights), weights)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"no {CONFIG_NAME} in {directory.resolve()}: expected it beside the weights"
        raise ObjectNotFound(msg) from error
    except ValueError as error:
        raise DamagedError(f"{path.resolve()} is not JSON: {error}") from error
    if not isinstance(config, dict):
        msg = f"{path.resolve()} must hold a JSON object, got {type(config).__name__}"
        raise DamagedError(msg)
    return config


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (FileNotFoundError, RuntimeError) as error:  # the second is torch's, of its own opening
        if path.exists():
            raise
        raise ObjectNotFound(f"{path.absolute()} went away while it was being read") from error
    except SafetensorError as error:
        msg = f"{path.resolve()} is not a safetensors file: {error}"
        raise DamagedError(msg) from error


def read_legacy_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a ``.bin`` or ``.pt`` file as PEFT and torch wrote them once.

    Raises:
        DamagedError: it does not parse, or holds anything but tensors by name.
    """
    try:
        # weights_only admits tensors and containers alone: no code of the file runs.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        zipfile.BadZipFile,
    ) as error:
        # Torch's own text tells the reader to load the file without weights_only.
        reason = str(error).partition("\n")[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it is damaged, or asks for other classes; convert it to safetensors"
        msg = f"{path.resolve()} is not a plain dictionary of tensors: {reason}"
        raise DamagedError(msg) from error
    if not isinstance(loaded, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in loaded.items()
    ):
        msg = f"{path.resolve()} must hold a dictionary of names to tensors"
        raise DamagedError(msg)
    return loaded


def _without_adapter_name(
    tensors: Mapping[str, torch.Tensor], path: Path
) -> dict[str, torch.Tensor]:
    plain: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = plain_key(key)
        if name in plain:
            msg = f"{path.resolve()} holds several adapters: {name!r} occurs more than once"
            raise StateError(msg)
        plain[name] = tensor
    return plain


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """The bytes of ``adapter_model.safetensors``: how many, and an iterable used up once."""

    size: int
    chunks: Iterable[Buffer]


@dataclass(frozen=True, slots=True)
class WrittenAdapter:
    """What was written: a record of each of the two files, and the weights' SHA-256 (hex)."""

    files: tuple[FileRecord, ...]
    sha256: str


def weights_file(tensors: Mapping[str, torch.Tensor]) -> WeightsFile:
    """The weights file of tensors in memory, as they are: no scaling, no cast.

    Raises:
        StateError: a tensor that is not plain and dense.
        NonFiniteError: a value that is NaN or infinite.
    """
    plain = {}
    for key in sorted(tensors):
        if type(tensors[key]) not in (torch.Tensor, torch.nn.Parameter):
            msg = f"{key!r} is a {type(tensors[key]).__name__}; gather it to a plain tensor first"
            raise StateError(msg)
        if not bool(torch.isfinite(tensors[key]).all()):
            raise NonFiniteError(f"{key!r} holds NaN or infinity; nothing was written")
        # Own memory each: the format refuses tensors that share their storage.
        plain[key] = tensors[key].detach().cpu().contiguous().clone()
    data = save(plain, metadata={"format": "pt"})
    return WeightsFile(len(data), (data,))


def write_adapter_files(
    storage: Storage,
    directory: str | Callable[[], str],
    weights: WeightsFile,
    config: Mapping[str, Any],
    *,
    then: Callable[[], object] = lambda: None,
) -> WrittenAdapter:
    """Write the two files into a directory of a store: first the weights, then the config.

    Args:
        storage: the store.
        directory: where, or what says so. That is asked late: where the bytes are collected before
            they are sent, a place that is still being taken costs nothing.
        weights: the weights' file.
        config: content of the other one.
        then: called when the weights are there.

    Raises:
        StorageError: the store failed; whatever the stream, ``directory`` or ``then`` raises passes
            through.
    """
    encoded = config_bytes(config)

    def at(name: str) -> str:
        return f"{directory if isinstance(directory, str) else directory()}/{name}"

    # Ended at once also when the store fails: nobody may read the chunks after this returns, for
    # their memory is the source's.
    with Tally() as tally:
        chunks = tally.over(weights.chunks)
        if storage.has_rename or weights.size > ONE_PUT_BYTES:
            storage.put_stream(at(WEIGHTS_NAME), chunks, weights.size)
        else:
            body = collect(view for chunk in chunks for view in as_views(chunk))
            if len(body) != weights.size:
                msg = f"the stream of {WEIGHTS_NAME} gave {len(body)} of {weights.size} bytes"
                raise StorageError(msg)
            storage.put(at(WEIGHTS_NAME), body)
        then()
        storage.put(at(CONFIG_NAME), encoded)
        record, sha256 = tally.result(WEIGHTS_NAME)
    return WrittenAdapter((file_record(CONFIG_NAME, [encoded]), record), sha256)


def write_adapter_dir(
    url: str | Path,
    weights: WeightsFile | Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> WrittenAdapter:
    """Write an adapter directory that a reader sees whole or not at all.

    On a file system it is written under a temporary name beside the target and renamed; where
    one is replaced, old and new change places. On an object store the config comes last.

    Args:
        url: the directory: a local path or any URL that storage can be opened for.
        weights: tensors by PEFT key, or a stream of the finished file.
        config: content of ``adapter_config.json``.
        overwrite: replace an adapter that is there already; anything else is never replaced.
        storage_options: passed to the store.

    Raises:
        ConfigError: the URL names no directory that could be made.
        AlreadyExists: something is there, and ``overwrite`` is off or it is no adapter.
        StorageError: the store failed.
    """
    if not isinstance(weights, WeightsFile):
        weights = weights_file(weights)
    local = local_directory(url)
    if local is None:
        return _write_to_prefix(str(url), weights, config, overwrite, storage_options)
    if not local.name:
        raise ConfigError(f"{str(url)!r} is no name for a new directory")
    storage = open_storage(local.parent)
    existing = _replaceable(storage, local.name, overwrite, str(local))
    temporary = f"{TMP_PREFIX}{new_attempt()}"
    try:
        written = write_adapter_files(storage, temporary, weights, config)
        if existing:
            exchange_dirs(local.parent / temporary, local)
        else:
            storage.rename_dir(temporary, local.name)
    finally:
        # After a rename there is nothing left under this name; after an exchange, the old one.
        storage.delete_tree(temporary)
    return written


def _write_to_prefix(
    url: str,
    weights: WeightsFile,
    config: Mapping[str, Any],
    overwrite: bool,
    storage_options: Mapping[str, Any] | None,
) -> WrittenAdapter:
    scheme, _, path = url.partition("://")
    parent, _, name = path.strip("/").rpartition("/")
    if not parent:
        raise ConfigError(f"{url!r} names a whole store; name a directory in it")
    storage = open_storage(f"{scheme}://{parent}", storage_options)
    if _replaceable(storage, name, overwrite, url):
        # The config goes first: from then on readers find no adapter rather than a mixed one.
        storage.delete(f"{name}/{CONFIG_NAME}")
        storage.delete_tree(name)
    try:
        return write_adapter_files(storage, name, weights, config)
    except BaseException:
        with contextlib.suppress(StorageError):  # the failure itself is what must be heard
            # With a config it is whole: another writer was faster, and readers may have it.
            if not storage.exists(f"{name}/{CONFIG_NAME}"):
                storage.delete_tree(name)
        raise


def _replaceable(storage: Storage, name: str, overwrite: bool, shown: str) -> bool:
    """Whether something is there that may be replaced; False when the place is free."""
    if storage.exists(name):
        raise AlreadyExists(f"{shown} is a file; want a directory's name")
    present = storage.list(name)
    if not present and not (storage.has_rename and _is_local_dir(storage, name)):
        return False
    if not overwrite:
        raise AlreadyExists(f"{shown} exists already; choose another name, or set overwrite")
    foreign = [entry.name for entry in present if entry.is_dir or entry.name not in _OWN_FILES]
    if foreign:
        msg = f"{shown} is not replaced: {foreign[0]!r} in it is no part of an adapter"
        raise AlreadyExists(msg)
    return True


def _is_local_dir(storage: Storage, name: str) -> bool:
    path = storage.local_path(name)
    return path is not None and path.is_dir()


def local_directory(url: str | Path) -> Path | None:
    """The absolute path that a plain path or ``file://`` URL means, or None for other stores.

    Raises:
        ConfigError: a ``file://`` URL of another machine.
    """
    text = str(url)
    if text.startswith("file://"):
        parts = urlsplit(text)
        if parts.netloc not in {"", "localhost"}:
            raise ConfigError(f"{text!r} names a file on another machine; write file:///path")
        text = unquote(parts.path)
    return None if "://" in text else Path(text).expanduser().absolute()
