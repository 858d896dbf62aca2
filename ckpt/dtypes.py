"""Tensor dtypes under the codes of the safetensors format, with their sizes.

The sub-byte codes (``F4``, ``F6_*``) are left out: torch packs them in its own way and nothing
that trains has them.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from .errors import StateError

TORCH_DTYPES = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "C64": torch.complex64,
    }
)
"""safetensors code → torch dtype."""

_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
_ITEM_BYTES = {code: dtype.itemsize for code, dtype in TORCH_DTYPES.items()}


def dtype_code(dtype: torch.dtype) -> str:
    """The safetensors code of a torch dtype, e.g. ``"BF16"``.

    Raises:
        StateError: the format has no code for it.
    """
    try:
        return _CODES[dtype]
    except KeyError:
        known = ", ".join(str(known) for known in _CODES)
        msg = f"tensors of {dtype} cannot be stored; the format knows {known}"
        raise StateError(msg) from None


def item_bytes(code: str) -> int | None:
    """Bytes of one element, or None for a code that is not in :data:`TORCH_DTYPES`."""
    return _ITEM_BYTES.get(code)
