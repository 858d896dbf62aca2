"""The pickle inside a file of ``torch.save``, read without running anything that it names.

As for DCP's metadata (:mod:`ckpt.dcp.stock_pickle`), every name that is admitted is mapped to a
stand-in made for this one read. Admitted are those by which torch writes tensors, parameters and
sharded tensors (DTensor), and NumPy its arrays; any other is refused before it could be imported.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from ckpt.dcp.stock_pickle import check_opcodes
from ckpt.errors import CkptError, DamagedError, StateError

_MAX_DIMS: Final = 64
_STORAGES: Final[Mapping[str, torch.dtype]] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_TENSOR: Final = "torch.distributed.tensor"
_RECORDS: Final = (
    # Where releases of torch keep, or kept, the classes that a DTensor is pickled with.
    (_TENSOR, "DTensor"),
    ("torch.distributed._tensor.api", "DTensor"),
    (f"{_TENSOR}._api", "DTensor"),
    (f"{_TENSOR}._dtensor_spec", "DTensorSpec"),
    (f"{_TENSOR}._dtensor_spec", "TensorMeta"),
    (f"{_TENSOR}._dtensor_spec", "ShardOrderEntry"),
    ("torch.distributed._tensor.placement_types", "DTensorSpec"),
    ("torch.distributed._tensor.placement_types", "TensorMeta"),
    (f"{_TENSOR}.placement_types", "Shard"),
    (f"{_TENSOR}.placement_types", "Replicate"),
    ("torch.distributed._tensor.placement_types", "Shard"),
    ("torch.distributed._tensor.placement_types", "Replicate"),
    ("torch.distributed.device_mesh", "DeviceMesh"),
    ("torch.distributed._mesh_layout", "_MeshLayout"),
    ("torch.distributed._mesh_layout", "_FlatLayout"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)
_NUMPY_REBUILD: Final = ("numpy._core.multiarray", "numpy.core.multiarray")


@dataclass(frozen=True, slots=True)
class StoredView:
    """A tensor's place in the file: a strided view of one stored block of elements.

    Attributes:
        storage: name of the block.
        dtype: of the elements.
        numel: elements in the block.
        offset: first element of the view.
        shape: its extents.
        stride: steps between elements, one entry a dimension.
    """

    storage: str
    dtype: torch.dtype
    numel: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Record:
    """What stands in for an object: its class's name, and what it was given."""

    kind = ""

    def __new__(cls, *args: Any) -> Record:
        """Keep whatever the pickle gives; nothing is called."""
        made = super().__new__(cls)
        made.args = args
        made.fields = {}
        return made

    args: tuple[Any, ...]
    fields: dict[str, Any]
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state
        self.fields = _merged(state)

    def get(self, *names: str) -> Any:
        """The first of these fields that is there, or None."""
        return next((self.fields[name] for name in names if name in self.fields), None)


@dataclass(frozen=True, slots=True)
class _Storage:
    name: str
    dtype: torch.dtype
    numel: int


def read_torch_pickle(data: bytes, where: str) -> Any:
    """The object in a file of ``torch.save``, made of records, views and plain values.

    Args:
        data: the file's ``data.pkl``.
        where: the file's path, for messages.

    Raises:
        StateError: it names something that is not on the list; nothing was imported or run.
        DamagedError: it is no such pickle.
    """
    try:
        check_opcodes(data, where)
        return _Unpickler(data, where).load()
    except CkptError:
        raise
    except Exception as error:
        msg = f"{where}: cannot be read: {type(error).__name__}: {error!s:.200}"
        raise DamagedError(msg) from error


class _Unpickler(pickle.Unpickler):
    """Resolves names to stand-ins only."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name.

        Raises:
            StateError: it is not on the list.
        """
        known = self._known.get((module, name))
        if known is None and module == "torch":
            # A dtype can be given as it is: it is immutable and cannot be called.
            found = vars(torch).get(name)
            known = found if isinstance(found, torch.dtype) else None
        if known is None:
            msg = (
                f"{self._where}: the file names {module}.{name}, which is not among the classes "
                "that are read here; nothing was imported or run, and nothing was read"
            )
            raise StateError(msg)
        return known

    def persistent_load(self, pid: Any) -> Any:
        """A reference to a stored block.

        Raises:
            DamagedError: it is none.
        """
        good = (
            isinstance(pid, tuple)
            and len(pid) == 5
            and pid[0] == "storage"
            and isinstance(pid[1], torch.dtype)
            and isinstance(pid[2], str)
            and type(pid[4]) is int
            and pid[4] >= 0
        )
        if not good:
            raise DamagedError(
                f"{self._where}: refers to {pid!r:.100}, which is no block of a file"
            )
        return _Storage(pid[2], pid[1], pid[4])


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Fresh objects for every read: a pickle can set attributes on what it names."""
    known: dict[tuple[str, str], Any] = {
        (module, name): type(name, (Record,), {"kind": name}) for module, name in _RECORDS
    }
    known |= {("torch", name): dtype for name, dtype in _STORAGES.items()}
    known["collections", "OrderedDict"] = _fresh(lambda *items: OrderedDict(*items))
    known["torch", "Size"] = _fresh(_sizes)
    known["torch", "device"] = _fresh(lambda *parts: ":".join(str(p) for p in parts[:2]))
    known["torch.serialization", "_get_layout"] = _fresh(lambda name: str(name)[:100])
    known["torch._utils", "_rebuild_tensor_v2"] = _fresh(_view)
    known["torch._utils", "_rebuild_parameter"] = _fresh(lambda data, *_: data)
    known["torch._utils", "_rebuild_parameter_with_state"] = _fresh(lambda data, *_: data)
    known["torch._utils", "_rebuild_wrapper_subclass"] = _fresh(lambda *_: None)
    known["torch._tensor", "_rebuild_from_type_v2"] = _fresh(_with_state)
    known["_codecs", "encode"] = _fresh(lambda text, encoding: _latin(text, encoding))
    for module in _NUMPY_REBUILD:
        known[module, "_reconstruct"] = _fresh(lambda kind, *_: _array(kind))
    return known


def _fresh(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)


def _sizes(sizes: Any = ()) -> tuple[int, ...]:
    good = isinstance(sizes, list | tuple) and len(sizes) <= _MAX_DIMS
    if not good or not all(type(n) is int and n >= 0 for n in sizes):
        msg = f"a torch.Size of something else than a few sizes: {sizes!r:.100}"
        raise ValueError(msg)
    return tuple(sizes)


def _view(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> StoredView:
    shape, steps = _sizes(size), _sizes(stride)
    last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
    if not isinstance(storage, _Storage) or type(offset) is not int or offset < 0:
        msg = "a tensor without a stored block"
        raise ValueError(msg)
    if 0 not in shape and last >= storage.numel:
        msg = f"a tensor of shape {shape} that reaches beyond its block of {storage.numel} elements"
        raise ValueError(msg)
    return StoredView(storage.name, storage.dtype, storage.numel, offset, shape, steps)


def _with_state(_rebuild: Any, kind: Any, _arguments: Any, state: Any) -> Any:
    """A DTensor, as the record of what it was given; other subclasses of tensor are not read."""
    if not (isinstance(kind, type) and issubclass(kind, Record) and kind.kind == "DTensor"):
        msg = f"a tensor of the subclass {kind!r:.100}"
        raise ValueError(msg)
    record = kind()
    record.__setstate__(state)
    return record


def _array(kind: Any) -> Record:
    if not (isinstance(kind, type) and issubclass(kind, Record) and kind.kind == "ndarray"):
        msg = f"an array of the class {kind!r:.100}"
        raise ValueError(msg)
    return kind()


def _latin(text: Any, encoding: Any) -> bytes:
    """How bytes are written in pickles of protocol 2."""
    if not isinstance(text, str) or encoding != "latin1":
        msg = f"bytes in the encoding {encoding!r:.100}"
        raise ValueError(msg)
    return text.encode("latin1")


def _merged(state: Any) -> dict[str, Any]:
    """The fields of an object: its dictionary's, and those of its slots."""
    parts = state if isinstance(state, tuple) else (state,)
    return {k: v for part in parts if isinstance(part, dict) for k, v in part.items()}
