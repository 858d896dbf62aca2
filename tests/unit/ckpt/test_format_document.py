"""``docs/format.md`` is complete: a reader made from it alone reads what the package writes.

The reader below uses the standard library only, and none of the package's code.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from support.steps import tiny_adapter, write_step, write_writer

from ckpt.storage import open_storage

BLOCK = 8 * 1024 * 1024


def unsealed(path: Path, kind: str) -> dict:
    data = path.read_bytes()
    document = json.loads(data)

    def canonical(value: dict) -> bytes:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        ).encode()

    assert canonical(document) == data
    assert (document["format"], document["schema"]) == (kind, 1)
    rest = {key: value for key, value in document.items() if key != "sha256"}
    assert hashlib.sha256(canonical(rest)).hexdigest() == document["sha256"]
    return document


def lineage(root: Path) -> list[Path]:
    writers = {
        int(path.stem): unsealed(path, "ckpt.writer")
        for path in (root / "writers").iterdir()
        if re.fullmatch(r"\d{4}\.json", path.name)
    }
    steps = [
        (int(match[2]), int(match[1]), path)
        for path in (root / "steps").iterdir()
        if (match := re.fullmatch(r"step-(\d{8})\.w(\d{4})", path.name))
    ]
    found, epoch, limit = [], max(writers), None
    while epoch is not None:
        mine = [
            entry for entry in steps if entry[0] == epoch and (limit is None or entry[1] <= limit)
        ]
        found += [path for *_, path in sorted(mine, reverse=True)]
        record = writers.get(epoch, {"parent_epoch": None, "parent_step": None})
        epoch, limit = record["parent_epoch"], record["parent_step"]
    return found


def read_step(directory: Path) -> tuple[dict, dict[str, bytes], object]:
    """(manifest, tensor bytes by name, state)."""
    manifest = unsealed(directory / "MANIFEST.json", "ckpt.step")
    assert directory.name == f"step-{manifest['step']:08d}.w{manifest['epoch']:04d}"
    files = {}
    for file in manifest["files"]:
        data = (directory / file["name"]).read_bytes()
        assert len(data) == file["size"]
        assert zlib.crc32(data) == file["crc32"]
        blocks = [zlib.crc32(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]
        assert blocks == file["block_crc32"]
        files[file["name"]] = data
    width = {"F32": 4, "BF16": 2, "I64": 8, "BOOL": 1}
    tensors = {
        tensor["name"]: assembled(tensor, files, width[tensor["dtype"]])
        for tensor in manifest["tensors"]
    }
    [name] = [name for name in files if name.endswith("state.json")]
    state = json.loads(files[name])
    assert (state["format"], state["schema"]) == ("ckpt.state", 1)
    return manifest, tensors, value_of(state["value"])


def assembled(tensor: dict, files: dict[str, bytes], width: int) -> bytes:
    """A tensor's row-major bytes, put together element by element."""
    whole: dict[tuple[int, ...], bytes] = {}
    for chunk in tensor["chunks"]:
        data = files[chunk["file"]][chunk["start"] : chunk["end"]]
        inner = itertools.product(*(range(size) for size in chunk["sizes"]))
        for number, position in enumerate(inner):
            at = tuple(o + p for o, p in zip(chunk["offsets"], position, strict=True))
            assert at not in whole
            whole[at] = data[number * width : (number + 1) * width]
    order = itertools.product(*(range(size) for size in tensor["shape"]))
    return b"".join(whole[at] for at in order)


def value_of(value: object) -> object:
    if isinstance(value, list):
        return [value_of(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: value_of(item) for key, item in value.items()}
    if value["$"] == "tuple":
        return tuple(value_of(item) for item in value["v"])
    if value["$"] == "dict":
        return {value_of(key): value_of(item) for key, item in value["v"]}
    if value["$"] == "tensor":
        return value["dtype"], value["shape"], base64.b64decode(value["v"])
    raise AssertionError(value)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_reader_made_from_the_document_reads_a_step(tmp_path, world: int, dim: int) -> None:
    tensors, export = tiny_adapter()
    tensors["model.half"] = torch.randn(5, 3).to(torch.bfloat16)
    tensors["model.flag"] = torch.tensor(True)
    tensors["model.count"] = torch.arange(7)
    state = {"shared": {"a": (1, 2.5), 3: None}, "ranks": [{"rng": torch.arange(4)}]}
    storage = open_storage(tmp_path)
    write_step(storage, 7, tensors, world=world, dim=dim, export=export, state=state)
    write_step(storage, 9, {"model.x": torch.ones(2)})
    write_step(storage, 8, {"model.y": torch.ones(2)}, epoch=2)
    write_writer(storage, 2, parent=(7, 1))

    order = lineage(tmp_path)
    assert [path.name for path in order] == ["step-00000008.w0002", "step-00000007.w0001"]
    manifest, found, decoded = read_step(order[1])
    assert found == {name: raw(tensor) for name, tensor in tensors.items()}
    assert manifest["world_size"] == world
    assert [rule["key"] for rule in manifest["export"]["rules"]] == [r.key for r in export.rules]
    assert decoded == {
        "shared": {"a": (1, 2.5), 3: None},
        "ranks": [{"rng": ("I64", [4], raw(torch.arange(4)))}],
    }


def test_the_document_names_what_the_code_has() -> None:
    from ckpt import layout, manifest, state
    from ckpt.dtypes import TORCH_DTYPES

    text = (Path(__file__).parents[3] / "docs" / "format.md").read_text()
    names = [
        layout.MANIFEST, layout.STATE, layout.LATEST, layout.TMP_PREFIX, layout.TRASH_PREFIX,
        manifest.STEP_FORMAT, manifest.VERSION_FORMAT, manifest.WRITER_FORMAT, state.STATE_FORMAT,
        layout.writer_path(3), layout.step_dir(42, 3), layout.shard_name(0, 2),
        layout.version_dir("run7", 42), layout.claim_path("run7", 42),
        *TORCH_DTYPES,
        *(field for kind in (manifest.StepManifest, manifest.VersionManifest, manifest.WriterRecord)
          for field in kind.__dataclass_fields__),
        *state._DECODERS,
    ]  # fmt: skip
    assert [name for name in names if f"`{name}" not in text and name not in text] == []
    assert {state.SCHEMA, manifest.SCHEMA} == {1}
