"""Read a root with Python and NumPy alone, as docs/format.md has it: no torch, no package of ours.

``python examples/read_checkpoint.py ROOT RUN`` tells of the newest step and the newest version.
A bucket is copied to a directory first. bfloat16 comes as float32, and float8 as bytes.
"""

import hashlib
import json
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

BLOCK, DIGIT = 8 * 1024 * 1024, "[0-9]"
SCHEMAS = {"ckpt.step": 4, "ckpt.version": 1, "ckpt.writer": 1}
CODES = "BOOL ? U8 u1 I8 i1 U16 <u2 I16 <i2 U32 <u4 I32 <i4 U64 <u8 I64 <i8 F16 <f2 BF16 <u2"
CODES += " F32 <f4 F64 <f8 C64 <c8 F8_E4M3 u1 F8_E4M3FNUZ u1 F8_E5M2 u1 F8_E5M2FNUZ u1 F8_E8M0 u1"
DTYPES = dict(zip(CODES.split()[::2], CODES.split()[1::2], strict=True))
FORM = {"sort_keys": True, "separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}


class Damaged(ValueError):
    """What lies there is not what was committed."""


def require(holds: bool, what: object) -> None:
    """Raise Damaged unless ``holds``."""
    if not holds:
        raise Damaged(what)


def unsealed(path: Path, kind: str, **named: int | str) -> dict[str, Any]:
    """A sealed document of the format ``kind`` that says ``named``, as its path does."""
    try:
        document = dict(json.loads(path.read_bytes()))
        require(json.dumps(document, **FORM).encode() == path.read_bytes(), "not canonical")
    except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{path}: {error}") from None
    claimed = document.pop("sha256", None)
    sha256 = hashlib.sha256(json.dumps(document, **FORM).encode()).hexdigest()
    require(claimed == sha256, f"{path}: its own hash differs")
    require(document.get("schema") in range(1, SCHEMAS[kind] + 1), f"{path}: unknown schema")
    require({"format": kind, **named}.items() <= document.items(), f"{path}: not what it should be")
    return document


def lineage(root: Path) -> list[tuple[Path, dict[str, int]]]:
    """(directory, its step and epoch) of the steps that a restore may choose from, newest first."""
    writers, steps = {}, {}
    for path in (root / "writers").glob(f"{DIGIT * 4}.json"):
        try:
            writers[int(path.stem)] = unsealed(path, "ckpt.writer", epoch=int(path.stem))
        except Damaged as error:
            writers[int(path.stem)] = print(error, file=sys.stderr)
    for path in (root / "steps").glob(f"step-{DIGIT * 8}.w{DIGIT * 4}"):
        step, epoch = int(path.name[5:13]), int(path.name[15:])
        try:
            unsealed(path / "MANIFEST.json", "ckpt.step", step=step, epoch=epoch)
            steps[epoch, step] = path
            writers.setdefault(epoch, None)
        except Damaged as error:
            print(error, file=sys.stderr)
    chain, epoch, limit = [], max(writers, default=None), 99_999_999
    known = epoch is None or writers[epoch] is not None or epoch in {pair[0] for pair in steps}
    require(known, f"the record of writer {epoch}, the newest, is damaged, and it saved nothing")
    while epoch is not None:
        mine = sorted(pair for pair in steps if pair[0] == epoch and pair[1] <= limit)
        chain += [(steps[e, s], {"step": s, "epoch": e}) for e, s in reversed(mine)]
        record = writers.get(epoch) or {"parent_epoch": None, "parent_step": None}
        require((record["parent_epoch"] or 0) < epoch, f"writer {epoch} has a younger parent")
        epoch, limit = record["parent_epoch"], record["parent_step"]
    return chain


def read_files(directory: Path, manifest: dict[str, Any]) -> dict[str, np.ndarray]:
    """The bytes of each file of a step or version, once size and checksums are as they should."""
    files = {}
    for file in manifest["files"]:
        path = directory / file["name"]
        require(path.resolve().is_relative_to(directory.resolve()), f"{path}: leads outside")
        require(path.is_file() and path.stat().st_size == file["size"], f"{path}: wrong size")
        data = np.memmap(path, "u1", "r") if file["size"] else np.empty(0, "u1")
        blocks = [zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        require([zlib.crc32(data), blocks] == [file["crc32"], file["block_crc32"]], path)
        files[file["name"]] = data
    return files


def values(raw: np.ndarray, code: str, shape: list[int]) -> np.ndarray:
    """Row-major bytes as an array."""
    array = np.array(raw).view(DTYPES[code]).reshape(shape)
    return (array.astype("<u4") << 16).view("<f4") if code == "BF16" else array


def assembled(tensor: dict[str, Any], files: dict[str, np.ndarray]) -> np.ndarray:
    """A whole tensor from the pieces that ranks wrote."""
    name, code, shape = tensor["name"], tensor["dtype"], tensor["shape"]
    whole, seen = np.empty(shape, values(np.empty(0, "u1"), code, [0]).dtype), np.zeros(shape, bool)
    for chunk in tensor["chunks"]:
        raw = files[chunk["file"]][chunk["start"] : chunk["end"]]
        box = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
        require(not seen[box].any(), f"{name}: pieces overlap")
        whole[box], seen[box] = values(raw, code, chunk["sizes"]), True
    require(bool(seen.all()), f"{name}: pieces are missing")
    return whole


def first_whole(kind: str, places: Iterable[tuple[Path, dict]]) -> tuple[dict, dict]:
    """(manifest, files) of the first directory of ``places`` that is whole."""
    for directory, named in places:
        try:
            manifest = unsealed(directory / "MANIFEST.json", kind, **named)
            return manifest, read_files(directory, manifest)
        except Damaged as error:
            print(error, file=sys.stderr)
    raise Damaged(f"no {kind} is whole")


def newest_step(root: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], Any]:
    """(manifest, tensors by name, content of state.json) of the newest step that is whole."""
    manifest, files = first_whole("ckpt.step", lineage(root))
    state = next(bytes(files[name]) for name in files if name.endswith("state.json"))
    tensors = {tensor["name"]: assembled(tensor, files) for tensor in manifest["tensors"]}
    return manifest, tensors, json.loads(state)["value"]


def newest_version(root: Path, run: str) -> tuple[dict[str, Any], Any, dict[str, np.ndarray]]:
    """(manifest, PEFT config, PEFT tensors) of the newest version of a run that is whole."""
    found = sorted((root / "adapters").glob(f"{run}-v{DIGIT * 8}"), reverse=True)
    manifest, files = first_whole("ckpt.version", [(p, {"name": p.name}) for p in found])
    data = files["adapter_model.safetensors"]
    require(hashlib.sha256(data).hexdigest() == manifest["adapter_sha256"], "another adapter")
    start = 8 + int.from_bytes(bytes(data[:8]), "little")
    header = json.loads(bytes(data[8:start]))
    header.pop("__metadata__", None)
    raw = {name: data[start:][slice(*entry["data_offsets"])] for name, entry in header.items()}
    tensors = {name: values(raw[name], e["dtype"], e["shape"]) for name, e in header.items()}
    return manifest, json.loads(bytes(files["adapter_config.json"])), tensors


if __name__ == "__main__":
    manifest, tensors, state = newest_step(Path(sys.argv[1]))
    print(f"step {manifest['step']}: {len(tensors)} tensors, {len(state['ranks'])} ranks")
    for run in sys.argv[2:]:
        manifest, config, tensors = newest_version(Path(sys.argv[1]), run)
        print(f"{manifest['name']}: {len(tensors)} tensors, rank {config['r']}")
