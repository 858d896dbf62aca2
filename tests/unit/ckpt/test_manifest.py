"""Manifests: what they say comes back, and nothing that does not verify gets in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest

from ckpt.envelope import canonical_json, seal, utc_now
from ckpt.errors import CkptError, ConfigError, DamagedError, PlanError
from ckpt.manifest import CheckedTensors, StepManifest, VersionManifest, WriterRecord
from ckpt.types import (
    BLOCK_BYTES,
    AdapterExport,
    BaseIdentity,
    Chunk,
    FileRecord,
    TensorRecord,
    TensorRule,
)

SHA = "0123456789abcdef" * 4


def step_manifest(**changes: Any) -> StepManifest:
    """Two shards: a matrix split by rows, a scalar; and the state file."""
    manifest = StepManifest(
        step=42,
        epoch=3,
        attempt="abcd1234",
        created="2026-11-25T09:38:53.000001Z",
        writer_version="0.1.0",
        world_size=2,
        mesh={"dims": ["dp"], "shape": [2]},
        fingerprint="f" * 64,
        base=BaseIdentity("Qwen/Qwen2-7B", SHA),
        export=AdapterExport(
            peft_config={"r": 4, "lora_alpha": 4.0, "target_modules": ["q_proj"]},
            rules=(
                TensorRule("w", "base_model.model.w.lora_A.weight", 1.0, 0, 8, None),
                TensorRule("w", "base_model.model.w.lora_B.weight", 0.5, None, None, 3),
            ),
        ),
        tensors=(
            TensorRecord(
                "model.w",
                "BF16",
                (5, 4),
                (
                    Chunk((0, 0), (3, 4), "abcd1234/shard-0.safetensors", 128, 152),
                    Chunk((3, 0), (2, 4), "abcd1234/shard-1.safetensors", 64, 80),
                ),
            ),
            TensorRecord("model.none", "F32", (0, 3), ()),
            TensorRecord(
                "optim.w.step",
                "F32",
                (),
                (Chunk((), (), "abcd1234/shard-0.safetensors", 152, 156),),
            ),
        ),
        files=(
            FileRecord("abcd1234/shard-0.safetensors", 156, 1, (1,)),
            FileRecord("abcd1234/shard-1.safetensors", 80, 2, (2,)),
            FileRecord("abcd1234/state.json", BLOCK_BYTES + 1, 2**32 - 1, (0, 7)),
            FileRecord("empty", 0, 0, ()),
        ),
        adapter_sha256=SHA,
        policy_version=7,
    )
    return dataclasses.replace(manifest, **changes)


def version_manifest(**changes: Any) -> VersionManifest:
    manifest = VersionManifest(
        number=42,
        name="run7-v00000042",
        step=42,
        policy_version=7,
        epoch=3,
        attempt="abcd1234",
        created=utc_now(),
        writer_version="0.1.0",
        adapter_sha256=SHA,
        dtype="bfloat16",
        base=None,
        files=(FileRecord("adapter_config.json", 10, 1, (1,)),),
        probe={"prompt": "hi", "logprobs": [-0.5]},
    )
    return dataclasses.replace(manifest, **changes)


def writer_record(**changes: Any) -> WriterRecord:
    record = WriterRecord(3, 2, 40, "host-1", 4711, utc_now(), "n")
    return dataclasses.replace(record, **changes)


@pytest.mark.parametrize(
    "document",
    [
        step_manifest(),
        step_manifest(mesh=None, base=None, export=None, adapter_sha256=None, policy_version=None),
        step_manifest(tensors=(), files=()),
        step_manifest(step=0, epoch=1, world_size=1),
        version_manifest(),
        version_manifest(step=None, policy_version=None, probe=None, files=()),
        writer_record(),
        writer_record(epoch=1, parent_epoch=None, parent_step=None),
    ],
)
def test_what_is_written_comes_back(document: Any) -> None:
    data = document.to_bytes()
    assert type(document).from_bytes(data, "x") == document
    assert type(document).from_bytes(data, "x").to_bytes() == data


def test_the_bytes_are_canonical_and_prove_themselves() -> None:
    data = step_manifest().to_bytes()
    document = json.loads(data)
    assert document["format"] == "ckpt.step"
    assert document["schema"] == 1
    assert b" " not in data.replace(b"Qwen/Qwen2-7B", b"")
    claimed = document.pop("sha256")
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == claimed


def test_read_only_mappings_and_tuples_are_json() -> None:
    config = MappingProxyType({"target_modules": ("q", "v"), "inner": MappingProxyType({"a": 1})})
    manifest = step_manifest(export=AdapterExport(config, ()))
    again = StepManifest.from_bytes(manifest.to_bytes(), "x")
    assert again.export.peft_config == {"target_modules": ["q", "v"], "inner": {"a": 1}}


def test_non_ascii_text_stays() -> None:
    manifest = step_manifest(base=BaseIdentity("Modèle/模型\U0001f600", SHA))
    assert "模型".encode() in manifest.to_bytes()
    assert StepManifest.from_bytes(manifest.to_bytes(), "x") == manifest


def test_a_file_is_found_by_name() -> None:
    assert step_manifest().file("empty").size == 0
    with pytest.raises(KeyError):
        step_manifest().file("other")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: 2}, {"a": {3}}, b"x", "\ud800"])
def test_what_json_lacks_is_refused_on_writing(value: object) -> None:
    with pytest.raises(ConfigError):
        step_manifest(mesh={"x": value}).to_bytes()
    with pytest.raises(ConfigError):
        step_manifest(export=AdapterExport({"x": value}, ())).to_bytes()


def test_nesting_without_end_is_refused_on_writing() -> None:
    mesh: dict[str, Any] = {}
    mesh["self"] = mesh
    with pytest.raises(ConfigError, match="nested more than 100 levels"):
        step_manifest(mesh=mesh).to_bytes()


def test_tensors_that_were_checked_before_give_the_same_bytes() -> None:
    manifest = step_manifest()
    checked = CheckedTensors.of(manifest.tensors, manifest.files)
    assert checked.fits(manifest.tensors, manifest.files)
    again = dataclasses.replace(manifest, step=manifest.step + 1)
    assert again.to_bytes(checked) == again.to_bytes()


def test_a_check_holds_for_its_own_records_and_sizes_only() -> None:
    manifest = step_manifest()
    checked = CheckedTensors.of(manifest.tensors, manifest.files)
    named = {chunk.file for tensor in manifest.tensors for chunk in tensor.chunks}
    shorter = tuple(
        dataclasses.replace(file, size=file.size - 1) if file.name in named else file
        for file in manifest.files
    )
    assert not checked.fits(manifest.tensors, shorter)
    with pytest.raises(PlanError, match="must lie between start and the file's"):
        dataclasses.replace(manifest, files=shorter).to_bytes(checked)
    fewer = manifest.tensors[:-1]
    assert not checked.fits(fewer, manifest.files)
    other = dataclasses.replace(manifest, tensors=fewer)
    assert StepManifest.from_bytes(other.to_bytes(checked), "here").tensors == fewer


def test_every_flipped_bit_is_found() -> None:
    data = writer_record().to_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            WriterRecord.from_bytes(bytes(damaged), "x")


def test_every_truncation_is_found() -> None:
    data = writer_record().to_bytes()
    for size in range(len(data)):
        with pytest.raises(DamagedError):
            WriterRecord.from_bytes(data[:size], "x")


def test_the_right_hash_over_other_white_space_is_refused() -> None:
    document = json.loads(writer_record().to_bytes())
    with pytest.raises(DamagedError, match="not in canonical form"):
        WriterRecord.from_bytes(json.dumps(document).encode(), "x")


def test_an_edited_manifest_is_refused() -> None:
    data = step_manifest().to_bytes().replace(b'"step":42', b'"step":43')
    with pytest.raises(DamagedError, match="self-hash does not match"):
        StepManifest.from_bytes(data, "x")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a ckpt.step document"),
        (b"\xff", "not a ckpt.step document"),
        (b"[]", "not a ckpt.step document"),
        (b"[" * 200_000, "not a ckpt.step document"),
        (b"{}", "not a ckpt.step document"),
        (b'{"format":"ckpt.version"}', "not a ckpt.step document"),
        (b'{"format":"ckpt.step"}', "schema version must be a positive integer"),
        (b'{"format":"ckpt.step","schema":true}', "schema version must be a positive integer"),
        (b'{"format":"ckpt.step","schema":0}', "schema version must be a positive integer"),
        (b'{"format":"ckpt.step","schema":5}', "schema 5 is newer than 4.*upgrade the package"),
        (b'{"format":"ckpt.step","schema":1}', "self-hash does not match"),
        (b'{"format":"ckpt.step","schema":1,"x":NaN}', "NaN is not JSON"),
        (b'{"format":"ckpt.step","schema":1,"x":1e999}', "not a ckpt.step document"),
        (b'{"format":"ckpt.step","schema":1,"x":' + b"9" * 5000 + b"}", "not a ckpt.step"),
    ],
)
def test_foreign_bytes_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message) as caught:
        StepManifest.from_bytes(data, "steps/s/MANIFEST.json")
    assert str(caught.value).startswith("steps/s/MANIFEST.json: ")


def test_documents_do_not_stand_in_for_each_other() -> None:
    with pytest.raises(DamagedError, match=r"not a ckpt\.step document"):
        StepManifest.from_bytes(version_manifest().to_bytes(), "x")
    with pytest.raises(DamagedError, match=r"not a ckpt\.version document"):
        VersionManifest.from_bytes(step_manifest().to_bytes(), "x")


def resealed(document: Any, edit: Callable[[dict[str, Any]], object]) -> bytes:
    """A document with a right hash over edited members."""
    body = json.loads(document.to_bytes())
    kind, schema = body.pop("format"), body.pop("schema")
    del body["sha256"]
    edit(body)
    return seal(kind, schema, body)


def put(*path: Any) -> Callable[[Any], Callable[[dict[str, Any]], None]]:
    """``put("a", 0, "b")(value)``: an edit that sets body["a"][0]["b"]."""

    def with_value(value: Any) -> Callable[[dict[str, Any]], None]:
        def edit(body: Any) -> None:
            for part in path[:-1]:
                body = body[part]
            body[path[-1]] = value

        return edit

    return with_value


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def edit(body: Any) -> None:
        for part in path[:-1]:
            body = body[part]
        del body[path[-1]]

    return edit


CHUNK = ("tensors", 0, "chunks", 0)
STEP_DAMAGE = [
    (drop("step"), "step is missing"),
    (drop(*CHUNK, "file"), r"tensors\[0\].chunks\[0\].file is missing"),
    (put("surprise")(1), "surprise is not a member of this schema"),
    (put("base", "surprise")(1), "base.surprise is not a member"),
    (put(*CHUNK, "surprise")(1), r"chunks\[0\].surprise is not a member"),
    (put("step")(-1), "step must be an integer from 0"),
    (put("step")(100_000_000), "step must be an integer from 0"),
    (put("step")("42"), "step must be an integer from 0"),
    (put("step")(True), "step must be an integer from 0"),
    (put("step")(42.0), "step must be an integer from 0"),
    (put("epoch")(0), "epoch must be an integer from 1"),
    (put("attempt")("../x"), "attempt is not an attempt id"),
    (put("created")("yesterday"), "created must be an ISO 8601 time in UTC"),
    (put("created")("2026-01-01T00:00:00"), "created must be an ISO 8601 time in UTC"),
    (put("created")("2026-01-01T00:00:00+02:00"), "created must be an ISO 8601 time in UTC"),
    (put("world_size")(0), "world_size must be"),
    (put("mesh")([]), "mesh must be an object"),
    (put("fingerprint")(None), "fingerprint must be text"),
    (put("base")("name"), "base must be an object"),
    (put("base", "config_hash")(1), "base.config_hash must be text"),
    (put("adapter_sha256")("abc"), "adapter_sha256 must be 64 hexadecimal digits"),
    (put("policy_version")(-1), "policy_version must be"),
    (put("export", "rules", 0, "scale")(1), "scale must be a number with a fraction"),
    (put("export", "rules", 0, "pad_to")(None), "pad_to must be null exactly when"),
    (put("export", "rules", 0, "pad_to")(0), "pad_to must be an integer from 1"),
    (put("export", "rules", 1, "key")("base_model.model.w.lora_A.weight"), "each entry once"),
    (put("export", "peft_config")([]), "peft_config must be an object"),
    (put("files")({}), "files must be a list of objects"),
    (put("files", 0)("x"), r"files\[0\] must be an object"),
    (put("files", 0, "crc32")(2**32), "crc32 must be an integer from 0"),
    (put("files", 0, "block_crc32")([]), "block_crc32 must have 1 entries for 156 bytes"),
    (put("files", 0, "block_crc32")([1, 2]), "block_crc32 must have 1 entries"),
    (put("files", 2, "block_crc32")([1]), "block_crc32 must have 2 entries"),
    (put("files", 3, "name")("abcd1234/state.json"), "must name each entry once"),
    (put("tensors", 1, "name")("model.w"), "must name each entry once"),
    (put("tensors", 0, "dtype")("F31"), "dtype of model.w is not a known code"),
    (put("tensors", 0, "shape")([2**62, 2**62]), "shape of model.w is too large"),
    (put("tensors", 1, "shape")([0] * 65), "shape of model.none is too large"),
    (put("tensors", 0, "shape")([5]), "must have 1 dimensions"),
    (put("tensors", 0, "shape")([-5, 4]), "shape must be an integer from 0"),
    (put("tensors", 0, "shape")([6, 4]), "cover it exactly.*gap: they hold 20 of 24"),
    (put("tensors", 0, "shape")([5, 5]), "cover it exactly.*gap"),
    (put("tensors", 0, "shape")([4, 4]), "cover it exactly.*leaves the shape"),
    (put("tensors", 0, "chunks", 1, "offsets")([2, 0]), "cover it exactly.*overlap"),
    (put("tensors", 0, "chunks", 1, "offsets")([4, 0]), "cover it exactly.*leaves the shape"),
    (put("tensors", 0, "chunks")([]), "cover it exactly.*gap"),
    (put(*CHUNK, "sizes")([3, 4, 1]), "must have 2 dimensions"),
    (put(*CHUNK, "end")(151), "need 24 bytes, got 23"),
    (put(*CHUNK, "start")(129), "need 24 bytes, got 23"),
    (put("tensors", 0, "dtype")("F32"), "need 48 bytes, got 24"),
    (put(*CHUNK, "file")("abcd1234/other"), "is not in the list of files"),
    (put(*CHUNK, "file")("../abcd1234/shard-0.safetensors"), "has the component"),
    (put("files", 1, "size")(79), "between start and the file's 79 bytes"),
    (put("tensors", 2, "chunks", 0, "start")(157), "between start and the file's 156 bytes"),
]


@pytest.mark.parametrize(("edit", "message"), STEP_DAMAGE)
def test_a_manifest_that_contradicts_itself_is_refused(edit, message: str) -> None:
    data = resealed(step_manifest(), edit)
    with pytest.raises(DamagedError, match=message) as caught:
        StepManifest.from_bytes(data, "where/it/lies")
    assert str(caught.value).startswith("where/it/lies: ")


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "a//b", "", ".", "a\\b", "a\0", "a" * 300, 5, None]
)
def test_paths_in_manifests_stay_inside(name: object) -> None:
    for document in (step_manifest(), version_manifest()):
        data = resealed(document, put("files", 0, "name")(name))
        with pytest.raises(DamagedError, match=r"files\[0\].name must be a path inside"):
            type(document).from_bytes(data, "x")


def test_tensors_may_not_share_bytes() -> None:
    one = TensorRecord("a", "U8", (4,), (Chunk((0,), (4,), "f", 0, 4),))
    two = TensorRecord("b", "U8", (4,), (Chunk((0,), (4,), "f", 3, 7),))
    files = (FileRecord("f", 8, 0, (0,)),)
    with pytest.raises(PlanError, match="share bytes of f"):
        step_manifest(tensors=(one, two), files=files).to_bytes()
    apart = dataclasses.replace(two, chunks=(Chunk((0,), (4,), "f", 4, 8),))
    step_manifest(tensors=(one, apart), files=files).to_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step must be an integer"),
        ({"attempt": "A"}, "attempt is not"),
        ({"files": ()}, "not in the list of files"),
        ({"created": "now"}, "created must be"),
    ],
)
def test_what_could_not_be_read_is_not_written(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        step_manifest(**changes).to_bytes()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("number")(43), "name must be <run>-v00000043"),
        (put("name")("run7"), "name must be <run>-v00000042"),
        (put("name")("../-v00000042"), "name must be <run>-v00000042"),
        (put("dtype")("bfloat16; rm"), "dtype must be a dtype's name"),
        (put("adapter_sha256")(None), "adapter_sha256 must be"),
        (put("probe")([]), "probe must be an object"),
        (put("surprise")([]), "surprise is not a member"),
    ],
)
def test_a_version_that_contradicts_itself_is_refused(edit, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        VersionManifest.from_bytes(resealed(version_manifest(), edit), "x")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("parent_step")(None), "null exactly when parent_epoch is"),
        (put("parent_epoch")(None), "null exactly when parent_epoch is"),
        (put("parent_epoch")(3), "parent_epoch must be an integer from 1 to 2"),
        (put("pid")(-1), "pid must be"),
        (put("host")("h" * 301), "host must be text"),
    ],
)
def test_a_writer_that_contradicts_itself_is_refused(edit, message: str) -> None:
    with pytest.raises(DamagedError, match=message):
        WriterRecord.from_bytes(resealed(writer_record(), edit), "x")


def test_the_first_writer_has_no_parent() -> None:
    with pytest.raises(PlanError, match="parent_epoch must be below the epoch 1"):
        writer_record(epoch=1, parent_epoch=1, parent_step=1).to_bytes()


def test_error_texts_stay_short() -> None:
    data = resealed(step_manifest(), put("step")(["x" * 100_000]))
    with pytest.raises(DamagedError) as caught:
        StepManifest.from_bytes(data, "x")
    assert len(str(caught.value)) < 400


def test_canonical_json_is_what_the_format_says() -> None:
    assert canonical_json({"b": [1, 2.5, None, True], "a": "é\n"}) == (
        '{"a":"é\\n","b":[1,2.5,null,true]}'.encode()
    )


def test_errors_have_one_root() -> None:
    assert issubclass(DamagedError, CkptError)
    assert issubclass(DamagedError, ValueError)
