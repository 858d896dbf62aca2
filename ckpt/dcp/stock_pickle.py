"""DCP's ``.metadata``: a pickle, read without running anything that it names.

The unpickler knows the few names that DCP itself writes, and maps each to an inert stand-in made
for this one read: a record that only holds what it is given, or a function over plain values.
Anything else is refused by name before it could be imported. The opcodes are looked at first, so
that a pickle which asks for absurd memory is refused as well.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any, Final

import torch

from ckpt.errors import CkptError, DamagedError, StateError

MAX_BYTES: Final = 1 << 30
"""No ``.metadata`` of a real checkpoint comes near this."""
_MAX_DIMS: Final = 64
_MEMO_WRITES: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})

_METADATA: Final = "torch.distributed.checkpoint.metadata"
_FILESYSTEM: Final = "torch.distributed.checkpoint.filesystem"
_RECORDS: Final = (
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_FILESYSTEM, "_StorageInfo"),
)


class StockRecord:
    """What stands in for an object of DCP: its class's name, and the state it was given."""

    kind = ""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """A field of a dataclass, or None."""
        state = getattr(self, "state", None)
        return state.get(name) if isinstance(state, dict) else None

    def __hash__(self) -> int:
        return hash((self.kind, self.get("fqn"), self.get("offset")))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StockRecord)
            and self.kind == other.kind
            and self.get("fqn") == other.get("fqn")
            and self.get("offset") == other.get("offset")
        )


def read_pickle(data: bytes, where: str) -> Any:
    """The object that a ``.metadata`` file describes, made of stand-ins and plain values.

    Args:
        data: the file.
        where: its path, for messages.

    Raises:
        StateError: it names something that DCP's metadata does not need; nothing was imported
            or run.
        DamagedError: it is no such pickle.
    """
    if len(data) > MAX_BYTES:
        msg = f"{where}: {len(data)} bytes are too many for the metadata of a checkpoint"
        raise DamagedError(msg)
    try:
        check_opcodes(data, where)
        return _Unpickler(data, where).load()
    except CkptError:
        raise
    except Exception as error:
        msg = f"{where}: cannot be read as DCP metadata: {type(error).__name__}: {error!s:.200}"
        raise DamagedError(msg) from error


def check_opcodes(data: bytes, where: str) -> None:
    """Refuse a pickle whose memo would take more memory than its size warrants."""
    for opcode, argument, _position in pickletools.genops(data):
        if opcode.name in _MEMO_WRITES and int(argument or 0) > len(data):
            msg = f"{where}: asks for a table of {argument} entries; it is not DCP metadata"
            raise DamagedError(msg)


class _Unpickler(pickle.Unpickler):
    """Resolves names to stand-ins only."""

    def __init__(self, data: bytes, where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._where = where
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name.

        Raises:
            StateError: it is not one that DCP writes.
        """
        known = self._known.get((module, name))
        if known is None and module == "torch":
            # A dtype can be given as it is: it is immutable and cannot be called.
            found = vars(torch).get(name)
            known = found if isinstance(found, torch.dtype) else None
        if known is None:
            msg = (
                f"{self._where}: the pickle names {module}.{name}, which the metadata of a DCP "
                "checkpoint has no use for; nothing was imported or run, and nothing was read. Do "
                "not load this checkpoint with a reader that trusts pickles"
            )
            raise StateError(msg)
        return known

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to outside objects.

        Raises:
            DamagedError: always.
        """
        msg = f"{self._where}: refers to an object outside; it is not DCP metadata"
        raise DamagedError(msg)


def _stand_ins() -> dict[tuple[str, str], Any]:
    """Fresh objects for every read: a pickle can set attributes on what it names."""
    known: dict[tuple[str, str], Any] = {
        (module, name): type(name, (StockRecord,), {"kind": name}) for module, name in _RECORDS
    }
    known[_METADATA, "_MEM_FORMAT_ENCODING"] = _plain(lambda number: int(number))
    known["torch.serialization", "_get_layout"] = _plain(lambda name: str(name)[:100])
    known["torch", "Size"] = _plain(_size)
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
            known[module, name] = _plain(lambda *parts: "/".join(str(part) for part in parts[:99]))
    return known


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: function(*arguments)


def _size(sizes: Any = ()) -> tuple[int, ...]:
    if not isinstance(sizes, list | tuple) or len(sizes) > _MAX_DIMS:
        msg = "a torch.Size of something else than a few integers"
        raise ValueError(msg)
    return tuple(sizes)
