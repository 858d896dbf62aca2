"""A whole model to and from a HuggingFace directory, over any number of ranks; without LoRA.

Weights are gathered to the first rank one tensor at a time and written as they arrive, in files of
bounded size. ``config.json`` is written last and taken away first: without it nothing takes the
directory for a model, so what is half written is never loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from archon_lora.errors import AdapterMismatch, ArchonLoraError
from archon_lora.models import load_hf_weights
from archon_lora.models.hf_files import CONFIG, INDEX, SINGLE, read_config
from archon_lora.names import canonical_fqn
from ckpt.dtypes import dtype_code
from ckpt.errors import NonFiniteError
from ckpt.storage import Buffer, Storage, open_storage

from .agree import agree, attempt, deadline_of, rank_of
from .gather import Gather, Whole, dtype_name, tensor_bytes
from .types import EngineLike

MAX_FILE_BYTES: Final = 5 * 1024**3
"""Largest weights file, unless a single tensor is larger; what the Hub's tools use too."""


@dataclass(frozen=True, slots=True)
class _File:
    """One weights file: its name, header, and tensors in order."""

    name: str
    header: bytes
    tensors: tuple[str, ...]
    size: int


def gather_model(engine: EngineLike) -> Gather:
    """A pass over all weights under their HuggingFace names; collective.

    Raises:
        UnmappedName: a tensor that no name map covers.
    """
    group, timeout = engine.cpu_group, deadline_of(engine)
    named: dict[str, Tensor] = {}
    with attempt(group, what="naming the model's weights", timeout=timeout):
        for part in engine.model_parts:
            for fqn, tensor in part.state_dict().items():
                named.update(
                    engine.state_dict_adapter.convert_single_to_hf(canonical_fqn(fqn), tensor)
                )
    return Gather(named, group, timeout=timeout)


def save_full_model(
    engine: EngineLike, path: str | Path, *, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """Write config and weights as a HuggingFace directory; the first rank writes.

    Args:
        engine: its model is written whole, in the dtype that it has.
        path: the directory, or a URL that storage can be opened for. Weights of an earlier save
            are replaced; other files stay.
        max_file_bytes: weights are split into files of at most this size.

    Raises:
        ArchonLoraError: ``path`` is the directory that the engine was built from.
        UnmappedName: a tensor that no name map covers.
        NonFiniteError: a weight is NaN or infinite.
        StorageError: the first rank could not write. The other ranks raise ``PeerFailed``.
    """
    source = Path(str(engine.config.path))
    if "://" not in str(path) and Path(path).resolve() == source.resolve():
        msg = (
            f"{Path(path).resolve()} is the model that this engine was built from, and a failed "
            "save would lose it; save to another path"
        )
        raise ArchonLoraError(msg)
    gather = gather_model(engine)
    error: Exception | None = None
    if rank_of(engine.cpu_group) == 0:
        try:
            raw = _config(read_config(source), gather.catalogue)
            _write(open_storage(str(path)), gather, raw, max_file_bytes)
        except Exception as caught:  # noqa: BLE001 - handed to agree(), which raises it again
            error = caught
    gather.drain()
    agree(
        engine.cpu_group,
        error,
        what=f"writing the model to {path}",
        timeout=deadline_of(engine),
    )


def load_full_model(engine: EngineLike, path: str | Path) -> None:
    """Read the weights of a HuggingFace directory; each rank reads its own part.

    Raises:
        ModelLoadError: lists what is missing, unexpected or misshapen, before anything changes.
        PeerFailed: another rank could not read.
    """
    what = f"loading the model at {Path(path).absolute()}"
    with attempt(engine.cpu_group, what=what, timeout=deadline_of(engine)):
        for part in engine.model_parts:
            load_hf_weights(part, engine.state_dict_adapter, path)


def _config(raw: Mapping[str, Any], catalogue: Mapping[str, Whole]) -> dict[str, Any]:
    """The base model's ``config.json``, with the dtype that the weights have now."""
    config = dict(raw)
    dtypes = {dtype_name(whole.dtype) for whole in catalogue.values()}
    name = "dtype" if "dtype" in config else "torch_dtype"
    config.pop("torch_dtype", None)
    if len(dtypes) == 1:
        config[name] = dtypes.pop()
    return config


def _write(storage: Storage, gather: Gather, config: dict[str, Any], limit: int) -> None:
    files = _plan(gather.catalogue, limit)
    storage.delete(CONFIG)
    tensors = iter(gather)
    for file in files:
        storage.put_stream(file.name, _stream(file, tensors), file.size)
    wanted = {file.name for file in files}
    if len(files) > 1:
        storage.put(INDEX, _json(_index(files, gather.catalogue)))
        wanted.add(INDEX)
    for entry in storage.list(""):
        ours = entry.name in {SINGLE, INDEX} or (
            entry.name.startswith("model-") and entry.name.endswith(".safetensors")
        )
        if ours and not entry.is_dir and entry.name not in wanted:
            storage.delete(entry.name)
    storage.put(CONFIG, _json(config))


def _plan(catalogue: Mapping[str, Whole], limit: int) -> list[_File]:
    """Cut the tensors, in the order in which they arrive, into files."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, whole in catalogue.items():
        size = _bytes_of(whole)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return [_file(SINGLE, groups[0], catalogue)]
    total = len(groups)
    return [
        _file(f"model-{number:05}-of-{total:05}.safetensors", names, catalogue)
        for number, names in enumerate(groups, start=1)
    ]


def _file(name: str, tensors: list[str], catalogue: Mapping[str, Whole]) -> _File:
    """Lay a file out after the safetensors format: u64 length, JSON, contiguous data."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        whole = catalogue[tensor]
        end = position + _bytes_of(whole)
        entries[tensor] = {
            "dtype": dtype_code(whole.dtype),
            "shape": list(whole.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the data aligned for readers that map the file
    header = len(text).to_bytes(8, "little") + text
    return _File(name, header, tuple(tensors), len(header) + position)


def _stream(file: _File, tensors: Iterator[tuple[str, Tensor | None]]) -> Iterator[Buffer]:
    yield file.header
    for wanted in file.tensors:
        name, tensor = next(tensors)
        if name != wanted or tensor is None:
            msg = f"{wanted} does not arrive in the order of the file, {name} does"
            raise AdapterMismatch(msg)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            msg = f"{name} holds NaN or infinite values; the model was not written"
            raise NonFiniteError(msg)
        yield tensor_bytes(tensor)


def _index(files: list[_File], catalogue: Mapping[str, Whole]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(_bytes_of(whole) for whole in catalogue.values())},
        "weight_map": {tensor: file.name for file in files for tensor in file.tensors},
    }


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def _bytes_of(whole: Whole) -> int:
    return math.prod(whole.shape) * whole.dtype.itemsize
