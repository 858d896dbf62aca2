"""The records inside manifests, to and from JSON, with every rule that a reader checks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from itertools import pairwise
from math import prod
from typing import Any

from .checksum import block_count
from .coverage import tiling_problem
from .dtypes import item_bytes
from .envelope import Fields, plain_json
from .errors import ConfigError
from .layout import check_attempt, path_problem
from .types import AdapterExport, BaseIdentity, Chunk, FileRecord, TensorRecord, TensorRule

_MAX_DIMS = 64


def base_json(base: BaseIdentity | None) -> dict[str, Any] | None:
    """The member ``base``."""
    return None if base is None else {"name": base.name, "config_hash": base.config_hash}


def export_json(export: AdapterExport | None) -> dict[str, Any] | None:
    """The member ``export``.

    Raises:
        ConfigError: the PEFT config is not JSON.
    """
    if export is None:
        return None
    return {
        "peft_config": plain_json(export.peft_config, "peft_config"),
        "rules": [
            {
                "source": rule.source,
                "key": rule.key,
                "scale": float(rule.scale),
                "pad_dim": rule.pad_dim,
                "pad_to": rule.pad_to,
                "index": rule.index,
            }
            for rule in export.rules
        ],
    }


def export_extras(export: AdapterExport | None) -> dict[str, Any]:
    """The members beside ``export`` that say more of it, where there is more to say."""
    extras: dict[str, Any] = {}
    if export is not None and export.others:
        extras["other_adapters"] = list(export.others)
    if export is not None and export.experts != "single":
        extras["experts"] = export.experts
    return extras


def tensor_json(tensor: TensorRecord) -> dict[str, Any]:
    """An entry of ``tensors``."""
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "chunks": [
            {
                "offsets": list(chunk.offsets),
                "sizes": list(chunk.sizes),
                "file": chunk.file,
                "start": chunk.start,
                "end": chunk.end,
            }
            for chunk in tensor.chunks
        ],
    }


def file_json(file: FileRecord) -> dict[str, Any]:
    """An entry of ``files``."""
    return {
        "name": file.name,
        "size": file.size,
        "crc32": file.crc32,
        "block_crc32": list(file.block_crc32),
    }


def parse_attempt(fields: Fields) -> str:
    """The member ``attempt``; raises DamagedError, as all readers here do."""
    attempt = fields.text("attempt", 64)
    try:
        return check_attempt(attempt)
    except ConfigError as error:
        fields.refuse("attempt", f"is not an attempt id: {error}", attempt)


def parse_base(fields: Fields) -> BaseIdentity | None:
    """The member ``base``."""
    if fields.raw("base") is None:
        return None
    base = fields.child("base")
    identity = BaseIdentity(name=base.text("name"), config_hash=base.text("config_hash", 200))
    base.done()
    return identity


def parse_export(fields: Fields, members: Container[str]) -> AdapterExport | None:
    """The member ``export``, and those beside it, ``other_adapters`` and ``experts``.

    No PEFT key may be made twice.

    Args:
        fields: the document.
        members: what it has.
    """
    others = fields.texts("other_adapters") if "other_adapters" in members else ()
    form = fields.text("experts", 32) if "experts" in members else None
    if fields.raw("export") is None:
        for name in ("other_adapters", "experts"):
            if name in members:
                fields.refuse(name, "must be absent without an export", fields.raw(name))
        return None
    if form not in (None, "stacked"):
        fields.refuse("experts", 'must be "stacked" or absent', form)
    export = fields.child("export")
    rules = tuple(_parse_rule(rule) for rule in export.objects("rules"))
    result = AdapterExport(
        peft_config=export.json("peft_config"),
        rules=rules,
        others=others,
        experts="single" if form is None else "stacked",
    )
    export.done()
    _refuse_repeats(fields, "export.rules", (rule.key for rule in rules))
    _refuse_repeats(fields, "other_adapters", others)
    return result


def _parse_rule(fields: Fields) -> TensorRule:
    scale = fields.raw("scale")
    if not isinstance(scale, float):  # infinity and NaN never get past the JSON reader
        fields.refuse("scale", "must be a number with a fraction", scale)
    rule = TensorRule(
        source=fields.text("source"),
        key=fields.text("key"),
        scale=scale,
        pad_dim=fields.optional("pad_dim", lambda name: fields.integer(name, 0, _MAX_DIMS)),
        pad_to=fields.optional("pad_to", lambda name: fields.integer(name, 1)),
        index=fields.optional("index", fields.integer),
    )
    fields.done()
    if (rule.pad_dim is None) != (rule.pad_to is None):
        fields.refuse("pad_to", "must be null exactly when pad_dim is", rule.pad_to)
    return rule


def parse_files(fields: Fields) -> tuple[FileRecord, ...]:
    """The member ``files``: confined paths, each once, with a CRC for every block."""
    files = []
    for item in fields.objects("files"):
        record = FileRecord(
            name=item.path("name"),
            size=item.integer("size"),
            crc32=item.integer("crc32", 0, 2**32 - 1),
            block_crc32=item.integers("block_crc32", 0, 2**32 - 1),
        )
        item.done()
        if len(record.block_crc32) != block_count(record.size):
            item.refuse(
                "block_crc32",
                f"must have {block_count(record.size)} entries for {record.size} bytes",
                len(record.block_crc32),
            )
        files.append(record)
    _refuse_repeats(fields, "files", (file.name for file in files))
    return tuple(files)


def _refuse_repeats(fields: Fields, member: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            fields.refuse(member, "must name each entry once", name)
        seen.add(name)


def parse_tensors(fields: Fields, sizes: Mapping[str, int]) -> tuple[TensorRecord, ...]:
    """The member ``tensors``: each covered exactly once, by bytes that no other one uses.

    Args:
        fields: the document.
        sizes: size in bytes of every listed file.
    """
    tensors = []
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for item in fields.objects("tensors"):
        record = TensorRecord(
            name=item.text("name"),
            dtype=item.text("dtype", 32),
            shape=item.integers("shape"),
            chunks=tuple(_parse_chunk(chunk, sizes) for chunk in item.objects("chunks")),
        )
        item.done()
        _check_tensor(item, record)
        for chunk in record.chunks:
            ranges.setdefault(chunk.file, []).append((chunk.start, chunk.end, record.name))
        tensors.append(record)
    _refuse_repeats(fields, "tensors", (tensor.name for tensor in tensors))
    for file, used in ranges.items():
        used.sort()
        for (_start, end, name), (start, _end, other) in pairwise(used):
            if start < end:
                fields.refuse("tensors", f"share bytes of {file}", [name, other])
    return tuple(tensors)


def _parse_chunk(fields: Fields, sizes: Mapping[str, int]) -> Chunk:
    chunk = Chunk(
        offsets=fields.integers("offsets"),
        sizes=fields.integers("sizes"),
        file=fields.text("file", 1024),
        start=fields.integer("start"),
        end=fields.integer("end"),
    )
    fields.done()
    if chunk.file not in sizes:
        problem = path_problem(chunk.file)
        fields.refuse("file", problem or "is not in the list of files", chunk.file)
    if not chunk.start <= chunk.end <= sizes[chunk.file]:
        fields.refuse(
            "end", f"must lie between start and the file's {sizes[chunk.file]} bytes", chunk.end
        )
    return chunk


def _check_tensor(fields: Fields, record: TensorRecord) -> None:
    width = item_bytes(record.dtype)
    if width is None:
        fields.refuse("dtype", f"of {record.name} is not a known code", record.dtype)
    if len(record.shape) > _MAX_DIMS or prod(record.shape) * width >= 2**63:
        fields.refuse("shape", f"of {record.name} is too large", record.shape)
    for chunk in record.chunks:
        if len(chunk.sizes) != len(record.shape) or len(chunk.offsets) != len(record.shape):
            fields.refuse(
                "chunks",
                f"of {record.name} must have {len(record.shape)} dimensions",
                [len(chunk.offsets), len(chunk.sizes)],
            )
        if chunk.end - chunk.start != prod(chunk.sizes) * width:
            fields.refuse(
                "chunks",
                f"of {record.name}: sizes {list(chunk.sizes)} of {record.dtype} need "
                f"{prod(chunk.sizes) * width} bytes",
                chunk.end - chunk.start,
            )
    problem = tiling_problem(
        record.shape, [(chunk.offsets, chunk.sizes) for chunk in record.chunks]
    )
    if problem:
        fields.refuse("chunks", f"of {record.name} must cover it exactly", problem)
