"""An adapter directory on any store, read as far as the rules need it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.dtypes import TORCH_DTYPES, dtype_code
from ckpt.errors import DamagedError, NoCheckpoint, ObjectNotFound
from ckpt.layout import ADAPTERS, STEPS
from ckpt.peft import CONFIG_NAME, LEGACY_WEIGHTS_NAME, WEIGHTS_NAME, read_legacy_weights
from ckpt.shard import HeaderTensor, header_size, parse_header
from ckpt.storage.base import Entry, Storage
from ckpt.types import BLOCK_BYTES

from .subject import Files, TensorForm

PT_NAME: Final = "adapter_model.pt"
ADDED_TOKENS: Final = "added_tokens.json"

_HEAD_BYTES: Final = 256 * 1024
"""Read at once from the beginning of a weights file; most headers are shorter."""


@dataclass(slots=True)
class AdapterFiles:
    """What was found in a directory.

    Attributes:
        files: names, and which of them holds the weights.
        config: content of ``adapter_config.json``; None if it is missing or no JSON object.
        config_problem: why it is no JSON object, or None.
        tensors: dtype and shape of every tensor; None if no weights could be read.
        weights_problem: why not, or None.
        spans: for safetensors files, where each tensor lies.
        legacy: tensors of a pickled file, which is read whole.
    """

    files: Files
    config: Mapping[str, Any] | None = None
    config_problem: str | None = None
    tensors: dict[str, TensorForm] | None = None
    weights_problem: str | None = None
    spans: dict[str, dict[str, HeaderTensor]] = field(default_factory=dict)
    legacy: dict[str, torch.Tensor] = field(default_factory=dict)


def read_files(storage: Storage, name: str) -> AdapterFiles:
    """Read the names, the configuration and the heads of the weights of a directory.

    Args:
        storage: opened at the directory.
        name: the directory's own name.

    Raises:
        ObjectNotFound: nothing is there.
        NoCheckpoint: a run's root, which holds adapters deeper down.
        StorageError: the store failed.
    """
    entries = storage.list("")
    if not entries:
        raise ObjectNotFound(f"nothing is at {storage.url}; name the adapter's directory")
    sizes = {entry.name: entry for entry in entries if not entry.is_dir}
    if not sizes and {entry.name for entry in entries} & {ADAPTERS, STEPS}:
        msg = (
            f"{storage.url} is the root of a run; name a version in it, "
            f"such as {storage.url}/{ADAPTERS}/run7-v00000012"
        )
        raise NoCheckpoint(msg)
    weights = _weights_files(sizes)
    added = _json(storage, ADDED_TOKENS) if ADDED_TOKENS in sizes else None
    tokens = added if isinstance(added, dict) else None
    found = AdapterFiles(Files(name, tuple(sizes), weights[0] if weights else None, tokens))
    if CONFIG_NAME in sizes:
        config = _json(storage, CONFIG_NAME)
        if isinstance(config, dict):
            found.config = config
        else:
            found.config_problem = f"{CONFIG_NAME} does not hold a JSON object"
    try:
        _read_heads(storage, [sizes[file] for file in weights], found)
    except DamagedError as error:
        found.tensors, found.weights_problem = None, str(error)
    return found


def _json(storage: Storage, name: str) -> Any:
    try:
        return json.loads(storage.read(name))
    except (ValueError, RecursionError):
        return None


def _weights_files(names: Mapping[str, Entry]) -> list[str]:
    """The files that a loader that reads as much as possible would read."""
    for name in (WEIGHTS_NAME, LEGACY_WEIGHTS_NAME, PT_NAME):
        if name in names:
            return [name]
    return sorted(name for name in names if name.endswith(".safetensors"))


def _read_heads(storage: Storage, weights: list[Entry], found: AdapterFiles) -> None:
    for entry in weights:
        if entry.name.endswith(".safetensors"):
            spans = _head(storage, entry)
            found.spans[entry.name] = spans
            forms = {key: TensorForm(span.dtype, span.shape) for key, span in spans.items()}
        else:
            found.legacy = _legacy(storage, entry.name)
            forms = {
                key: TensorForm(dtype_code(tensor.dtype), tuple(tensor.shape))
                for key, tensor in found.legacy.items()
            }
        found.tensors = {**(found.tensors or {}), **forms}


def _head(storage: Storage, entry: Entry) -> dict[str, HeaderTensor]:
    where = f"{storage.url}/{entry.name}"
    data = storage.read(entry.name, 0, min(_HEAD_BYTES, entry.size))
    size = header_size(data, entry.size, where)
    if size > len(data):
        data += storage.read(entry.name, len(data), size)
    return parse_header(data, entry.size, where)


def _legacy(storage: Storage, name: str) -> dict[str, torch.Tensor]:
    local = storage.local_path(name)
    if local is not None:
        return read_legacy_weights(local)
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / name
        copy.write_bytes(storage.read(name))
        return read_legacy_weights(copy)


def values(storage: Storage, found: AdapterFiles) -> Iterator[tuple[str, torch.Tensor]]:
    """Every floating-point tensor of the weights by key, in pieces of at most 8 MiB.

    Neighbours in the file are read with one request.
    """
    for key, tensor in found.legacy.items():
        if tensor.is_floating_point() and tensor.numel():
            yield key, tensor.detach().flatten()
    for file, spans in found.spans.items():
        for group in _groups(spans):
            first, last = group[0][2], group[-1][3]
            data = bytearray(storage.read(file, first, last))
            for key, dtype, start, end in group:
                if dtype.is_floating_point:
                    count = (end - start) // dtype.itemsize
                    yield (
                        key,
                        torch.frombuffer(data, dtype=dtype, count=count, offset=start - first),
                    )


def _groups(
    spans: Mapping[str, HeaderTensor],
) -> Iterator[list[tuple[str, torch.dtype, int, int]]]:
    group: list[tuple[str, torch.dtype, int, int]] = []
    for key, span in spans.items():
        dtype = TORCH_DTYPES[span.dtype]
        for start in range(span.start, span.end, BLOCK_BYTES):
            end = min(start + BLOCK_BYTES, span.end)
            if group and end - group[0][2] > BLOCK_BYTES:
                yield group
                group = []
            group.append((key, dtype, start, end))
    if group:
        yield group
