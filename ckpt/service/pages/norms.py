"""How large an adapter's update is, layer by layer, and how far two versions are apart.

The update of a module is ``s B A`` with A ``(r, in)`` and B ``(out, r)``. Its Frobenius norm needs
nothing of its size: ``|BA|² = <BᵀB, AAᵀ>``, two matrices of r by r. In the same way
``|B₁A₁ - B₂A₂|² = |B₁A₁|² + |B₂A₂|² - 2 <B₁ᵀB₂, A₁A₂ᵀ>``, also where the two ranks differ. All of
it is summed in float64, so that a difference of a hundred-millionth of the norm is still seen.

A file is read once, from front to back, in pieces that verify; one module is in memory at a time.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch

from ckpt.dtypes import TORCH_DTYPES
from ckpt.errors import ConfigError, DamagedError
from ckpt.layout import ADAPTERS
from ckpt.manifest import VersionManifest
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME
from ckpt.peft_config import split_key
from ckpt.shard import HeaderTensor, header_size, parse_header
from ckpt.storage import Storage, read_checked
from ckpt.types import FileRecord

MAX_FILE: Final = 4 * 1024**3
MAX_MODULE: Final = 64 * 1024**2
"""Bytes of one module's A and B; larger ones are refused."""
MAX_RANK: Final = 2048
MAX_MODULES: Final = 100_000
MAX_ROWS: Final = 64
MAX_COLUMNS: Final = 256
_USUAL: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WINDOW: Final = 24 * 1024**2
_HEAD: Final = 256 * 1024
_LAYER: Final = re.compile(r"(?:^|\.)([0-9]{1,6})(?:\.|$)")
_EXPERT: Final = re.compile(r"(^|\.)[0-9]+(?=\.|$)")

Tick = Callable[[float], None]
"""Told the share that is done, now and then; may raise to end the work."""


@dataclass(frozen=True, slots=True)
class NormTable:
    """Norms by module and layer.

    Attributes:
        modules: labels of the rows, such as ``self_attn.q_proj``.
        layers: numbers of the columns; -1 for modules that are in no layer.
        values: by (module, layer); what is in several experts is the root of the sum of squares.
        total: norm of all of it together.
        largest: the largest value.
    """

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    values: Mapping[tuple[str, int], float]
    total: float
    largest: float


class _Weights:
    """The pairs of matrices of one version, in the order of the file."""

    def __init__(self, storage: Storage, manifest: VersionManifest) -> None:
        files = {file.name: file for file in manifest.files}
        self._record: FileRecord = files[WEIGHTS_NAME]
        self._storage = storage
        directory = f"{ADAPTERS}/{manifest.name}"
        self._path = f"{directory}/{WEIGHTS_NAME}"
        where = f"{storage.url}/{self._path}"
        size = self._record.size
        if size > MAX_FILE:
            raise ConfigError(f"{where} has {size} bytes; heat maps are made of {MAX_FILE} at most")
        config_file = files[CONFIG_NAME]
        data = read_checked(storage, f"{directory}/{CONFIG_NAME}", config_file)
        self.scale = _scale(data, f"{storage.url}/{directory}/{CONFIG_NAME}")
        head = read_checked(storage, self._path, self._record, 0, min(_HEAD, size))
        length = header_size(head, size, where)
        if length > len(head):
            head = read_checked(storage, self._path, self._record, 0, length)
        self.pairs = _pairs(parse_header(head, size, where), where)
        self._window: tuple[int, bytes] = (0, b"")

    def matrix(self, tensor: HeaderTensor) -> torch.Tensor:
        """A tensor as float64, its first dimension kept and the others flattened."""
        start, data = self._window
        if not start <= tensor.start <= tensor.end <= start + len(data):
            end = max(tensor.end, min(tensor.start + _WINDOW, self._record.size))
            data = read_checked(self._storage, self._path, self._record, tensor.start, end)
            start = tensor.start
            self._window = (start, data)
        raw = bytearray(memoryview(data)[tensor.start - start : tensor.end - start])
        flat = torch.frombuffer(raw, dtype=TORCH_DTYPES[tensor.dtype])
        return flat.view(tensor.shape[0], -1).to(torch.float64)


def _scale(data: bytes, where: str) -> float:
    """The factor of every module's update, from ``adapter_config.json``."""
    try:
        config = json.loads(data)
        patterns = config.get("alpha_pattern") or config.get("rank_pattern")
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise DamagedError(f"{where} does not say the adapter's factor") from error
    except RecursionError as error:
        raise DamagedError(f"{where} is nested without end") from error
    if patterns:
        # Patterns are regular expressions of whoever wrote the file; published versions have
        # none, and a service runs nobody's expressions.
        raise ConfigError(f"{where} gives modules factors of their own, by patterns")
    if not math.isfinite(scale):
        raise DamagedError(f"{where} gives the factor {scale}")
    return scale


def _pairs(
    tensors: Mapping[str, HeaderTensor], where: str
) -> dict[str, tuple[HeaderTensor, HeaderTensor]]:
    """A and B of every module, in file order."""
    sides: dict[str, dict[str, HeaderTensor]] = {}
    for key, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        module, side = split_key(key)
        dtype = TORCH_DTYPES.get(tensor.dtype)
        if dtype is None or not dtype.is_floating_point or len(tensor.shape) < 2:
            raise DamagedError(f"{where}: {key} is no matrix of numbers")
        sides.setdefault(module, {})[side] = tensor
    if len(sides) > MAX_MODULES:
        raise ConfigError(f"{where} has {len(sides)} modules; {MAX_MODULES} can be shown")
    pairs = {}
    for module, found in sides.items():
        if set(found) != {"A", "B"}:
            raise DamagedError(f"{where}: {module} has only one of its two matrices")
        a, b = found["A"], found["B"]
        if a.end - a.start + b.end - b.start > MAX_MODULE or a.shape[0] > MAX_RANK:
            raise ConfigError(f"{where}: {module} is too large, or of too high a rank, to be shown")
        if math.prod(b.shape[1:]) != a.shape[0] or 0 in (*a.shape, *b.shape):
            raise DamagedError(f"{where}: the matrices of {module} do not fit each other")
        pairs[module] = (a, b)
    return pairs


def adapter_norms(storage: Storage, manifest: VersionManifest, tick: Tick) -> NormTable:
    """The norm of every module's update.

    Raises:
        DamagedError: bytes that do not verify, or no LoRA adapter.
        ConfigError: it is too large to be shown.
        StorageError: the store failed.
    """
    weights = _Weights(storage, manifest)
    squares: dict[str, float] = {}
    for module, share in _progress(weights.pairs):
        tick(share)
        squares[module] = _square(weights, module)
    return _table(squares)


def adapter_distance(
    storage: Storage, one: VersionManifest, other: VersionManifest, tick: Tick
) -> NormTable:
    """The norm of the difference of every module's updates in two versions.

    A module that only one of them has counts in full.

    Raises:
        DamagedError, ConfigError, StorageError: as :func:`adapter_norms`.
    """
    first, second = _Weights(storage, one), _Weights(storage, other)
    squares: dict[str, float] = {}
    modules = list(dict.fromkeys([*first.pairs, *second.pairs]))
    for module, share in _progress(dict.fromkeys(modules)):
        tick(share)
        if module not in first.pairs or module not in second.pairs:
            squares[module] = _square(first if module in first.pairs else second, module)
            continue
        a1, b1 = (first.matrix(tensor) for tensor in first.pairs[module])
        a2, b2 = (second.matrix(tensor) for tensor in second.pairs[module])
        if a1.shape[1] != a2.shape[1] or b1.shape[0] != b2.shape[0]:
            raise DamagedError(f"{module} has other dimensions in {other.name} than in {one.name}")
        s1, s2 = first.scale, second.scale
        if torch.equal(a1, a2) and torch.equal(b1, b2) and s1 == s2:
            squares[module] = 0.0
            continue
        whole = s1 * s1 * _inner(a1, b1, a1, b1) + s2 * s2 * _inner(a2, b2, a2, b2)
        squares[module] = max(0.0, whole - 2 * s1 * s2 * _inner(a1, b1, a2, b2))
    return _table(squares)


def _progress(modules: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    for number, module in enumerate(modules):
        yield module, number / len(modules)


def _square(weights: _Weights, module: str) -> float:
    a, b = (weights.matrix(tensor) for tensor in weights.pairs[module])
    return weights.scale**2 * _inner(a, b, a, b)


def _inner(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> float:
    """``⟨B₁A₁, B₂A₂⟩`` for A ``(r, in)`` and B ``(out, r)``, all float64."""
    return float(((b1.T @ b2) * (a1 @ a2.T)).sum())


def _table(squares: Mapping[str, float]) -> NormTable:
    cells: dict[tuple[str, int], float] = {}
    for module, square in squares.items():
        if not math.isfinite(square):
            raise DamagedError(f"{module} holds NaN or infinity")
        key = place_of(module)
        cells[key] = cells.get(key, 0.0) + square
    values = {key: math.sqrt(square) for key, square in cells.items()}
    modules = tuple(sorted({module for module, _layer in cells}, key=_order))
    layers = tuple(sorted({layer for _module, layer in cells}))
    if len(modules) > MAX_ROWS or len(layers) > MAX_COLUMNS:
        msg = f"{len(modules)} kinds of modules in {len(layers)} layers are too many to be shown"
        raise ConfigError(msg)
    return NormTable(
        modules=modules,
        layers=layers,
        values=values,
        total=math.sqrt(sum(cells.values())),
        largest=max(values.values(), default=0.0),
    )


def _order(module: str) -> tuple[str, int, str]:
    """Attention before the rest, and within a block in the order of computation."""
    block, _, name = module.rpartition(".")
    place = _USUAL.index(name) if name in _USUAL else len(_USUAL)
    return ("" if "attn" in block else block, place, name)


def place_of(module: str) -> tuple[str, int]:
    """(label, layer) of a module's name: the first number is its layer, others are experts.

    ``model.layers.3.mlp.experts.7.up_proj`` is in layer 3, under the label
    ``mlp.experts.*.up_proj``.
    """
    match = _LAYER.search(module)
    if match is None:
        return module, -1
    return _EXPERT.sub(r"\1*", module[match.end() :]) or "layer", int(match[1])
