"""Everything of a training state that is not a big tensor, as strict JSON: exact, no pickle.

Values that JSON has are written as they are: None, booleans, text, lists, dictionaries with text
keys, finite floats (shortest digits that read back the same) and integers of 64 bits. Everything
else becomes an object with the member ``$`` (its kind) and ``v`` (its value)::

    tuple, size, set, frozenset   v: items               (size is torch.Size)
    dict, odict, counter          v: [key, value] pairs  (any hashable keys; odict = OrderedDict)
    float                         v: the 8 bytes of the IEEE double, big-endian, in hexadecimal
    int                           v: hexadecimal text    (beyond 64 bits)
    complex                       v: [real, imaginary]
    str                           v: base64 of UTF-8 with surrogates passed through
    bytes, bytearray              v: base64
    tensor                        v: base64, dtype: safetensors code, shape
    dtype                         v: safetensors code    (torch.dtype)
    ndarray, numpy                v: base64, dtype: NumPy's type string, shape (numpy = a scalar)

Tensors are copied to the host, lose their gradient flag, and are limited to
:data:`MAX_TENSOR_BYTES`: big ones belong in a shard. A type that is not listed, a subclass of a
listed one included, is an error that names the value's place.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from .dtypes import TORCH_DTYPES, dtype_code
from .errors import DamagedError, StateError
from .memory import bytes_of

STATE_FORMAT = "ckpt.state"
SCHEMA = 1
MAX_TENSOR_BYTES = 16 * 1024 * 1024
_MAX_DEPTH = 100
_MAX_DIMS = 64
_NUMPY_DTYPE = re.compile(r"[<>|][biufcSU][0-9]{1,6}")
"""NumPy type strings of plain bytes; objects, voids and dates are refused."""


def encode_state(obj: Any) -> bytes:
    """The bytes of ``state.json``.

    Raises:
        StateError: a value of a type that cannot be stored exactly; names its place, for
            example ``state['scheduler']['fn']``.
    """
    document = {"format": STATE_FORMAT, "schema": SCHEMA, "value": _encode(obj, "state", 0)}
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def decode_state(data: bytes, where: str = "state.json") -> Any:
    """What :func:`encode_state` was given, equal in value and type.

    Raises:
        DamagedError: the bytes are not such a document.
    """
    try:
        document = json.loads(data.decode("ascii"), parse_constant=_refuse_constant)
        if not isinstance(document, dict) or document.get("format") != STATE_FORMAT:
            msg = "not a state document"
            raise _Malformed(msg)
        schema = document.get("schema")
        if schema != SCHEMA:
            msg = f"schema {schema!r} is not {SCHEMA}, the one this version reads"
            raise _Malformed(msg)
        if document.keys() != {"format", "schema", "value"}:
            msg = "its members are not format, schema and value"
            raise _Malformed(msg)
        return _decode(document["value"], 0)
    except (ValueError, TypeError, RecursionError, RuntimeError, OverflowError) as error:
        msg = f"{where}: cannot be read as training state: {str(error)[:300]}"
        raise DamagedError(msg) from None


class _Malformed(ValueError):
    """A document that breaks the rules above."""


def _refuse(path: str, reason: str) -> NoReturn:
    msg = f"{path}: {reason}"
    raise StateError(msg)


def _text(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode("ascii")


def _tag(kind: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"$": kind, "v": value, **more}


def _encode(obj: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        _refuse(f"{path[:80]}…", f"nested more than {_MAX_DEPTH} levels deep, or contains itself")
    if obj is None or obj is True or obj is False:
        return obj
    encoder = _ENCODERS.get(type(obj))
    if encoder is not None:
        return encoder(obj, path, depth + 1)
    if isinstance(obj, torch.dtype):
        return _tag("dtype", dtype_code(obj))
    numpy = sys.modules.get("numpy")
    if numpy is not None and (type(obj) is numpy.ndarray or isinstance(obj, numpy.generic)):
        return _encode_numpy(obj, path)
    kind = f"{type(obj).__module__}.{type(obj).__qualname__}"
    _refuse(
        path,
        f"a {kind} cannot be stored exactly in a checkpoint; give numbers, text, lists, "
        "dictionaries, tensors or arrays instead",
    )


def _encode_int(obj: int, path: str, depth: int) -> Any:
    return obj if -(2**63) <= obj < 2**63 else _tag("int", hex(obj))


def _encode_float(obj: float, path: str, depth: int) -> Any:
    return obj if math.isfinite(obj) else _tag("float", struct.pack(">d", obj).hex())


def _encode_complex(obj: complex, path: str, depth: int) -> Any:
    return _tag("complex", [_encode_float(part, path, depth) for part in (obj.real, obj.imag)])


def _has_surrogate(text: str) -> bool:
    """Whether JSON could not give the text back: it would join two halves of a pair."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def _encode_str(obj: str, path: str, depth: int) -> Any:
    if _has_surrogate(obj):
        return _tag("str", _text(obj.encode("utf-8", "surrogatepass")))
    return obj


def _encode_bytes(obj: bytes | bytearray, path: str, depth: int) -> Any:
    return _tag(type(obj).__name__, _text(obj))


def _encode_items(obj: Iterable[Any], path: str, depth: int) -> list[Any]:
    return [_encode(item, f"{path}[{index}]", depth) for index, item in enumerate(obj)]


def _tagged_items(kind: str) -> Callable[[Iterable[Any], str, int], Any]:
    return lambda obj, path, depth: _tag(kind, _encode_items(obj, path, depth))


def _encode_dict(obj: dict[Any, Any], path: str, depth: int) -> Any:
    if "$" in obj or not all(type(key) is str and not _has_surrogate(key) for key in obj):
        return _tag("dict", _encode_pairs(obj, path, depth))
    return {key: _encode(value, f"{path}[{key!r}]", depth) for key, value in obj.items()}


def _encode_pairs(obj: dict[Any, Any], path: str, depth: int) -> list[Any]:
    return [
        [_encode(key, f"{path} key", depth), _encode(value, f"{path}[{key!r:.80}]", depth)]
        for key, value in obj.items()
    ]


def _tagged_pairs(kind: str) -> Callable[[dict[Any, Any], str, int], Any]:
    return lambda obj, path, depth: _tag(kind, _encode_pairs(obj, path, depth))


def _encode_tensor(obj: torch.Tensor, path: str, depth: int) -> Any:
    if obj.layout != torch.strided or obj.is_quantized or obj.device.type == "meta":
        _refuse(path, f"only dense tensors with data can be stored, got {obj.layout} {obj.device}")
    size = obj.numel() * obj.element_size()
    if size > MAX_TENSOR_BYTES:
        _refuse(
            path,
            f"a tensor of {size} bytes is too big for the JSON state (limit {MAX_TENSOR_BYTES}); "
            "make it a parameter or a buffer of the model",
        )
    try:
        code = dtype_code(obj.dtype)
    except StateError as error:
        _refuse(path, str(error))
    flat = obj.detach().to("cpu").resolve_conj().resolve_neg().contiguous().reshape(-1)
    raw = bytes(bytes_of(flat)) if flat.numel() else b""
    return _tag("tensor", _text(raw), dtype=code, shape=list(obj.shape))


def _encode_numpy(obj: Any, path: str) -> Any:
    if not _NUMPY_DTYPE.fullmatch(obj.dtype.str):
        _refuse(path, f"a NumPy value of dtype {obj.dtype} cannot be stored")
    if obj.nbytes > MAX_TENSOR_BYTES:
        _refuse(path, f"an array of {obj.nbytes} bytes is too big (limit {MAX_TENSOR_BYTES})")
    kind = "ndarray" if obj.ndim or type(obj).__name__ == "ndarray" else "numpy"
    return _tag(kind, _text(obj.tobytes()), dtype=obj.dtype.str, shape=list(obj.shape))


_ENCODERS: dict[type, Callable[[Any, str, int], Any]] = {
    int: _encode_int,
    float: _encode_float,
    complex: _encode_complex,
    str: _encode_str,
    bytes: _encode_bytes,
    bytearray: _encode_bytes,
    list: _encode_items,
    tuple: _tagged_items("tuple"),
    torch.Size: _tagged_items("size"),
    set: lambda obj, path, depth: _tag("set", _encode_unordered(obj, path, depth)),
    frozenset: lambda obj, path, depth: _tag("frozenset", _encode_unordered(obj, path, depth)),
    dict: _encode_dict,
    OrderedDict: _tagged_pairs("odict"),
    Counter: _tagged_pairs("counter"),
    torch.Tensor: _encode_tensor,
}


def _encode_unordered(obj: Iterable[Any], path: str, depth: int) -> list[Any]:
    """Items of a set in an order that does not depend on the process's hash seed."""
    return sorted(_encode_items(obj, path, depth), key=json.dumps)


def _refuse_constant(name: str) -> NoReturn:
    msg = f"{name} is not JSON"
    raise _Malformed(msg)


def _decode(value: Any, depth: int) -> Any:
    if depth > 4 * _MAX_DEPTH:
        msg = "nested too deep"
        raise _Malformed(msg)
    if isinstance(value, list):
        return [_decode(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        msg = "a number is out of range"
        raise _Malformed(msg)
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: _decode(item, depth + 1) for key, item in value.items()}
    kind = value["$"]
    decoder = _DECODERS.get(kind) if isinstance(kind, str) else None
    members = {"$", "v", "dtype", "shape"} if kind in _ARRAYS else {"$", "v"}
    if decoder is None or value.keys() != members:
        msg = f"unknown kind of value {kind!r}"
        raise _Malformed(msg)
    return decoder(value, depth + 1)


def _decode_items(value: dict[str, Any], depth: int) -> list[Any]:
    if not isinstance(value["v"], list):
        msg = f"a {value['$']} must hold a list"
        raise _Malformed(msg)
    return [_decode(item, depth) for item in value["v"]]


def _decode_pairs(value: dict[str, Any], depth: int) -> list[tuple[Any, Any]]:
    pairs = _decode_items(value, depth)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            msg = f"a {value['$']} must hold pairs"
            raise _Malformed(msg)
    result = [(key, item) for key, item in pairs]
    if len(dict(result)) != len(result):
        msg = f"a {value['$']} holds a key twice"
        raise _Malformed(msg)
    return result


def _decode_bytes(value: dict[str, Any]) -> bytes:
    if not isinstance(value["v"], str):
        msg = f"a {value['$']} must hold base64 text"
        raise _Malformed(msg)
    return base64.b64decode(value["v"], validate=True)


def _decode_float(value: dict[str, Any], depth: int) -> float:
    data = bytes.fromhex(value["v"])
    if len(data) != 8:
        msg = "a float must hold 8 bytes"
        raise _Malformed(msg)
    return float(struct.unpack(">d", data)[0])


def _decode_complex(value: dict[str, Any], depth: int) -> complex:
    real, imaginary = _decode_items(value, depth)
    if not (isinstance(real, float) and isinstance(imaginary, float)):
        msg = "a complex number must hold two floats"
        raise _Malformed(msg)
    return complex(real, imaginary)


def _decode_shape(value: dict[str, Any]) -> tuple[int, ...]:
    shape = value["shape"]
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_DIMS
        or not all(type(n) is int and 0 <= n < 2**31 for n in shape)
    ):
        msg = "a shape must be a list of sizes"
        raise _Malformed(msg)
    return tuple(shape)


def _torch_dtype(code: Any) -> torch.dtype:
    dtype = TORCH_DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        msg = f"unknown dtype {str(code)[:40]!r}"
        raise _Malformed(msg)
    return dtype


def _decode_tensor(value: dict[str, Any], depth: int) -> torch.Tensor:
    dtype = _torch_dtype(value["dtype"])
    shape, raw = _decode_shape(value), bytearray(_decode_bytes(value))
    if len(raw) != math.prod(shape) * dtype.itemsize:
        msg = f"{len(raw)} bytes do not hold a tensor of shape {list(shape)}"
        raise _Malformed(msg)
    if dtype is torch.bool and any(byte > 1 for byte in raw):
        msg = "a boolean tensor holds a byte that is neither 0 nor 1"
        raise _Malformed(msg)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(raw, dtype=torch.uint8).view(dtype).reshape(shape)


def _decode_numpy(value: dict[str, Any], depth: int) -> Any:
    import numpy as np

    if not isinstance(value["dtype"], str) or not _NUMPY_DTYPE.fullmatch(value["dtype"]):
        msg = f"the NumPy dtype {str(value['dtype'])[:40]!r} is not allowed"
        raise _Malformed(msg)
    dtype = np.dtype(value["dtype"])
    if dtype.str != value["dtype"]:
        msg = f"the NumPy dtype {value['dtype']!r} is not allowed"
        raise _Malformed(msg)
    shape, raw = _decode_shape(value), bytearray(_decode_bytes(value))
    if len(raw) != math.prod(shape) * dtype.itemsize:
        msg = f"{len(raw)} bytes do not hold an array of shape {list(shape)}"
        raise _Malformed(msg)
    array = np.frombuffer(raw, dtype=dtype).reshape(shape) if raw else np.zeros(shape, dtype)
    return array[()] if value["$"] == "numpy" else array


_ARRAYS = {"tensor", "ndarray", "numpy"}
_DECODERS: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "int": lambda value, depth: int(value["v"], 16),
    "float": _decode_float,
    "complex": _decode_complex,
    "str": lambda value, depth: _decode_bytes(value).decode("utf-8", "surrogatepass"),
    "bytes": lambda value, depth: _decode_bytes(value),
    "bytearray": lambda value, depth: bytearray(_decode_bytes(value)),
    "tuple": lambda value, depth: tuple(_decode_items(value, depth)),
    "size": lambda value, depth: torch.Size(_decode_items(value, depth)),
    "set": lambda value, depth: set(_decode_items(value, depth)),
    "frozenset": lambda value, depth: frozenset(_decode_items(value, depth)),
    "dict": lambda value, depth: dict(_decode_pairs(value, depth)),
    "odict": lambda value, depth: OrderedDict(_decode_pairs(value, depth)),
    "counter": lambda value, depth: Counter(dict(_decode_pairs(value, depth))),
    "tensor": _decode_tensor,
    "dtype": lambda value, depth: _torch_dtype(value["v"]),
    "ndarray": _decode_numpy,
    "numpy": _decode_numpy,
}
