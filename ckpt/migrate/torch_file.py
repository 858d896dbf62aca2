"""A file of ``torch.save``, opened without trust; tensors are read one at a time.

The format is torch's since 1.6: a zip archive, uncompressed, with ``data.pkl`` and one entry for
every block of elements.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ckpt.dtypes import dtype_code
from ckpt.errors import DamagedError, ObjectNotFound, StateError

from .torch_pickle import Record, StoredView, read_torch_pickle

MAX_PICKLE: Final = 1 << 28
"""Names and shapes of a model's tensors; no real file comes near this."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rank's part of a tensor, or all of it.

    Attributes:
        view: where its elements lie in the file.
        shape: the whole tensor's.
        offsets: where the part begins in it.
    """

    view: StoredView
    shape: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def code(self) -> str:
        """Safetensors code of the dtype."""
        return dtype_code(self.view.dtype)


class TorchFile:
    """One file and the object in it.

    Args:
        path: the file.

    Attributes:
        path: the file.
        value: the object: plain values, :class:`StoredView` for tensors, :class:`Record` for
            DTensors and arrays.

    Raises:
        ObjectNotFound: no such file.
        StateError: it names a class that is not read here.
        DamagedError: it is no file of ``torch.save``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except FileNotFoundError as error:
            raise ObjectNotFound(f"no file {path}") from error
        except (zipfile.BadZipFile, OSError) as error:
            msg = f"{path} is no file of torch.save (as torch writes it since 1.6): {error}"
            raise DamagedError(msg) from error
        try:
            self._prefix = self._find_prefix()
            self.value = read_torch_pickle(self._entry("data.pkl", MAX_PICKLE), str(path))
        except BaseException:
            self._zip.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._zip.close()

    def _find_prefix(self) -> str:
        """The archive's own folder.

        Raises:
            DamagedError: there is not exactly one, or its numbers are big-endian.
        """
        names = [n for n in self._zip.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise DamagedError(f"{self.path} is no file of torch.save: {len(names)} data.pkl")
        prefix = self._prefix = names[0].removesuffix("data.pkl")
        order = self._entry("byteorder", 16)
        if order not in (b"", b"little"):
            raise DamagedError(f"{self.path} was written on a machine of byte order {order!r}")
        return prefix

    def _entry(self, name: str, limit: int) -> bytes:
        """An entry's bytes; empty where there is none.

        Raises:
            DamagedError: larger than the limit, compressed, or unreadable.
        """
        try:
            info = self._zip.getinfo(self._prefix + name)
        except KeyError:
            return b""
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > limit:
            msg = f"{self.path}: {name} is compressed or larger than the {limit} bytes that belong"
            raise DamagedError(msg)
        try:
            return self._zip.read(info)
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError) as error:
            raise DamagedError(f"{self.path}: {name} cannot be read: {error}") from error

    def tensor(self, view: StoredView) -> torch.Tensor:
        """A tensor's elements, contiguous and on the host.

        Raises:
            DamagedError: the block is not there or not as long as it should be.
        """
        size = view.numel * view.dtype.itemsize
        data = self._entry(f"data/{view.storage}", size)
        if len(data) != size:
            msg = f"{self.path}: block {view.storage} has {len(data)} bytes, {size} belong there"
            raise DamagedError(msg)
        if math.prod(view.shape) == 0:
            return torch.empty(view.shape, dtype=view.dtype)
        block = torch.frombuffer(bytearray(data), dtype=view.dtype)
        return block.as_strided(view.shape, view.stride, view.offset).contiguous()

    def piece(self, name: str, value: Any) -> Piece:
        """What a plain tensor or a DTensor holds, and of which whole.

        Args:
            name: what it is called, for messages.
            value: as it was found in :attr:`value`.

        Raises:
            StateError: no tensor, or one that is sharded in a way that is not read here.
            DamagedError: the part has not the shape that its placement gives it.
        """
        where = f"{self.path}: {name}"
        if isinstance(value, StoredView):
            return Piece(value, value.shape, (0,) * len(value.shape))
        if not isinstance(value, Record) or value.kind != "DTensor":
            raise StateError(f"{where} is a {_kind(value)}, want a tensor")
        local, spec = value.get("_local_tensor"), value.get("_spec")
        if not isinstance(local, StoredView) or not isinstance(spec, Record):
            raise DamagedError(f"{where}: a DTensor without its part")
        meta = spec.get("tensor_meta")
        shape = meta.args[0] if isinstance(meta, Record) and meta.args else None
        if not isinstance(shape, tuple):
            raise DamagedError(f"{where}: a DTensor that does not say its shape")
        sizes, coordinate = _mesh(spec.get("mesh", "device_mesh"), where)
        offsets, extents = _box(shape, spec.get("placements"), sizes, coordinate, where)
        if extents != local.shape:
            msg = f"{where}: the part has the shape {local.shape}, its placement gives {extents}"
            raise DamagedError(msg)
        return Piece(local, shape, offsets)

    def plain(self, value: Any, name: str) -> Any:
        """A value without records: tensors and arrays are read; for what is small.

        Raises:
            StateError: it holds something that is not plain data; names where.
            DamagedError: a tensor cannot be read.
        """
        if isinstance(value, StoredView):
            return self.tensor(value)
        if isinstance(value, Record):
            if value.kind == "ndarray":
                return _numpy(value, f"{self.path}: {name}")
            raise StateError(f"{self.path}: {name} is a {_kind(value)}, which is not plain data")
        if isinstance(value, dict):
            return type(value)(
                (key, self.plain(item, f"{name}[{key!r}]")) for key, item in value.items()
            )
        if isinstance(value, list | tuple):
            return type(value)(self.plain(v, f"{name}[{i}]") for i, v in enumerate(value))
        return value


def _kind(value: Any) -> str:
    return value.kind if isinstance(value, Record) else type(value).__name__


def _mesh(mesh: Any, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the mesh's dimensions, and this rank's place in each."""
    sizes: Any = None
    if isinstance(mesh, Record) and mesh.kind == "DeviceMesh":
        layout, whole = mesh.get("_layout"), mesh.get("mesh", "_mesh")
        if isinstance(whole, StoredView):  # torch up to 2.8
            sizes = whole.shape
        elif isinstance(layout, Record):
            axes = layout.get("axes")
            flat = layout.get("shape", "_shape") if axes is None else [_axis(a) for a in axes]
            sizes = (flat,) if isinstance(flat, int) else flat
        sizes = None if sizes is None else tuple(_extent(size) for size in sizes)
        place = mesh.get("_coordinate_on_dim")
        if sizes is not None and place is not None and len(place) == len(sizes):
            return sizes, tuple(place)
    raise StateError(f"{where}: a DTensor on a mesh whose layout is not known here")


def _axis(axis: Any) -> Any:
    return axis.get("shape") if isinstance(axis, Record) else None


def _extent(size: Any) -> int:
    """A dimension's size; one that was flattened from several is a tuple."""
    found = math.prod(size) if isinstance(size, tuple | list) else size
    if type(found) is not int or found < 1:
        msg = f"a mesh with a dimension of size {size!r:.100}"
        raise DamagedError(msg)
    return found


def _box(
    shape: tuple[int, ...],
    placements: Any,
    sizes: tuple[int, ...],
    coordinate: tuple[int, ...],
    where: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and extents of a rank's part, as ``Shard`` cuts: like ``torch.chunk``."""
    if not isinstance(placements, tuple | list) or len(placements) != len(sizes):
        raise DamagedError(f"{where}: {placements!r:.100} does not place it on {len(sizes)} dims")
    offsets, extents = [0] * len(shape), list(shape)
    for placement, ranks, place in zip(placements, sizes, coordinate, strict=True):
        kind = _kind(placement)
        if kind == "Replicate":
            continue
        dim = placement.get("dim") if isinstance(placement, Record) else None
        if kind != "Shard" or type(dim) is not int or not 0 <= dim < len(shape):
            raise StateError(f"{where} is placed as {kind} {dim!r}, which is not read here")
        part = -(-extents[dim] // ranks)
        start = min(part * place, extents[dim])
        offsets[dim] += start
        extents[dim] = min(part, extents[dim] - start)
    return tuple(offsets), tuple(extents)


def _numpy(record: Record, where: str) -> Any:
    """The array; NumPy is needed only if there is one."""
    import numpy as np

    state = record.state
    if not isinstance(state, tuple) or len(state) != 5:
        raise DamagedError(f"{where}: an array without its content")
    _version, shape, dtype, fortran, data = state
    base = dtype.args[0] if isinstance(dtype, Record) and dtype.args else None
    order = dtype.state[1] if isinstance(dtype, Record) and dtype.state else "|"
    plain = isinstance(base, str) and base[:1] in tuple("biufc") and order in ("<", "|")
    if not plain or not isinstance(data, bytes) or fortran:
        raise StateError(f"{where} is an array of {base!r:.20}, which is not plain data")
    try:
        return np.frombuffer(bytearray(data), dtype=np.dtype(f"{order}{base}")).reshape(shape)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{where}: {error}") from error
