"""Files of a HuggingFace model directory: ``config.json`` and safetensors, single or indexed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from archon_lora.errors import ModelLoadError

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*\.safetensors")

FLOAT_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors codes of the dtypes that plain (unquantised) weights have."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelLoadError: the file is missing, unreadable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        msg = f"cannot read {path}: {error.strerror or error}"
        raise ModelLoadError(msg) from error
    except ValueError as error:
        msg = f"{path} is not JSON: {error}"
        raise ModelLoadError(msg) from error
    if not isinstance(value, dict):
        msg = f"{path} must hold a JSON object, got {type(value).__name__}"
        raise ModelLoadError(msg)
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory.

    Raises:
        ModelLoadError: it is missing, unreadable, or not a JSON object.
    """
    return read_json(directory / CONFIG)


class HFWeights:
    """The tensors of a model directory, read slice by slice.

    Only headers are read on opening; :meth:`read` touches the bytes it returns and no others.

    Attributes:
        directory: the model directory.
        shapes: global shape of every tensor.
        bytes_read: bytes of tensor data returned so far.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open all files and read their headers.

        Args:
            directory: holds ``model.safetensors``, or ``model.safetensors.index.json`` and the
                files that it names.

        Raises:
            ModelLoadError: no safetensors there, a damaged file, an index that names a file
                outside the directory or disagrees with the files, or quantised tensors.
        """
        self.directory = Path(directory)
        self.bytes_read = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._handles: dict[str, Any] = {}
        with ExitStack() as stack:
            index = _tensor_files(self.directory)
            problems: list[str] = []
            for file, expected in index.items():
                path = self.directory / file
                try:
                    handle = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
                except (SafetensorError, OSError) as error:
                    msg = f"cannot read {path}: {error}"
                    raise ModelLoadError(msg) from error
                problems += self._take_headers(file, handle, expected)
            if problems:
                msg = f"{self.directory} cannot be loaded:\n  " + "\n  ".join(problems)
                raise ModelLoadError(msg)
            self._stack = stack.pop_all()

    def _take_headers(self, file: str, handle: Any, expected: set[str] | None) -> list[str]:
        """Record a file's tensors; returns what is wrong with them."""
        found = set(handle.keys())
        problems = []
        if expected is not None:
            problems += [
                f"{file}: lacks {name}, which {INDEX} lists" for name in sorted(expected - found)
            ]
            problems += [
                f"{file}: has {name}, which {INDEX} does not list"
                for name in sorted(found - expected)
            ]
        for name in sorted(found):
            view = handle.get_slice(name)
            if view.get_dtype() not in FLOAT_DTYPES:
                problems.append(
                    f"{file}: {name} has dtype {view.get_dtype()}; want one of "
                    f"{', '.join(FLOAT_DTYPES)} (quantised weights are not supported)"
                )
            self.shapes[name] = tuple(view.get_shape())
            self._handles[name] = handle
        return problems

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """Read one block of a tensor.

        Args:
            name: HF tensor name, one of ``shapes``.
            index: one slice a dimension.

        Returns:
            The block in the file's dtype; it may be a view of the file's memory map.
        """
        block: torch.Tensor = self._handles[name].get_slice(name)[index]
        self.bytes_read += block.numel() * block.element_size()
        return block

    def close(self) -> None:
        """Close all files."""
        self._handles.clear()
        self._stack.close()

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _tensor_files(directory: Path) -> dict[str, set[str] | None]:
    """Safetensors files of a directory and the tensors the index puts there (None: no index)."""
    if (directory / SINGLE).is_file():
        # transformers, too, prefers the single file when both are there.
        return {SINGLE: None}
    if (directory / INDEX).is_file():
        return dict(_read_index(directory))
    if not directory.is_dir():
        msg = f"{directory} is not a directory"
        raise ModelLoadError(msg)
    if (directory / "adapter_config.json").is_file():
        msg = f"{directory} is a PEFT adapter; give the directory of its base model"
        raise ModelLoadError(msg)
    if any(directory.glob("*.bin")):
        msg = (
            f"{directory} has only .bin weights, which are pickles and can run code when read; "
            "convert them with transformers: from_pretrained(...).save_pretrained(new_directory)"
        )
        raise ModelLoadError(msg)
    msg = f"{directory} has neither {SINGLE} nor {INDEX}"
    raise ModelLoadError(msg)


def _read_index(directory: Path) -> dict[str, set[str]]:
    """Files named by the index, each with its tensors."""
    where = directory / INDEX
    weight_map = read_json(where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{where} has no weight_map"
        raise ModelLoadError(msg)
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        # By name, not by resolved path: a hub cache links its files to a folder of blobs.
        if not isinstance(file, str) or _FILE_NAME.fullmatch(file) is None:
            msg = f"{where}: {name} lies in {file!r}, which is not a file name in the directory"
            raise ModelLoadError(msg)
        files.setdefault(file, set()).add(name)
    missing = sorted(file for file in files if not (directory / file).is_file())
    if missing:
        msg = f"{directory} lacks {', '.join(missing)}, named by {INDEX}"
        raise ModelLoadError(msg)
    return files
