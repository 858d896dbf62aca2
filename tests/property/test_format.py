"""The format under generated input: what is written comes back, and no bytes break a reader."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import hypothesis.extra.numpy as hnp
import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckpt.checksum import Crc32Blocks, crc32_combine, file_record
from ckpt.coverage import tiling_problem
from ckpt.dtypes import TORCH_DTYPES, item_bytes
from ckpt.envelope import canonical_json, seal, unseal
from ckpt.errors import DamagedError
from ckpt.layout import parse_step_dir, parse_version_name, path_problem, step_dir, version_name
from ckpt.lineage import committed_lineage
from ckpt.manifest import StepManifest, VersionManifest, WriterRecord
from ckpt.shard import ShardLayout, ShardTensor, parse_header
from ckpt.state import decode_state, encode_state
from ckpt.types import Chunk, FileRecord, TensorRecord

settings.register_profile("ckpt", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ckpt")

READERS = [
    lambda data: StepManifest.from_bytes(data, "x"),
    lambda data: VersionManifest.from_bytes(data, "x"),
    lambda data: WriterRecord.from_bytes(data, "x"),
    lambda data: parse_header(data, len(data), "x"),
    lambda data: decode_state(data, "x"),
]

names = st.text(min_size=1, max_size=20).filter(lambda text: text != "__metadata__")
valid_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | valid_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(valid_text, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(valid_text, json_values, max_size=5))
def test_sealed_documents_come_back(body: dict[str, Any]) -> None:
    assume(not body.keys() & {"format", "schema", "sha256"})
    data = seal("test", 1, body)
    again = unseal(data, "test", 1, "x")
    assert again == body
    assert canonical_json(again) == canonical_json(body)


@given(st.data())
def test_split_tensors_make_a_manifest_that_comes_back(data: st.DataObject) -> None:
    """Any tensor split into rows over ranks, laid out by the shard code, verifies."""
    world = data.draw(st.integers(1, 4))
    specs = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(sorted(TORCH_DTYPES)),
                st.lists(st.integers(0, 9), max_size=3),
            ),
            max_size=6,
        )
    )
    pieces: list[list[ShardTensor]] = [[] for _ in range(world)]
    for number, (dtype, shape) in enumerate(specs):
        name = f"model.t{number}"
        if not shape:
            pieces[number % world].append(ShardTensor(name, dtype, (), (), ()))
            continue
        rows = -(-shape[0] // world)
        for rank in range(world):
            low, high = min(rank * rows, shape[0]), min((rank + 1) * rows, shape[0])
            local = (high - low, *shape[1:])
            pieces[rank].append(
                ShardTensor(name, dtype, local, tuple(shape), (low, *(0,) * (len(shape) - 1)))
            )
    layouts = [ShardLayout.build(part) for part in pieces]
    chunks: dict[str, list[Chunk]] = {f"model.t{n}": [] for n in range(len(specs))}
    files = []
    for rank, layout in enumerate(layouts):
        body = layout.header + bytes(layout.size - len(layout.header))
        parsed = parse_header(body, layout.size, "x")
        assert {name: (e.start, e.end) for name, e in parsed.items()} == dict(layout.offsets)
        files.append(file_record(f"shard-{rank}", [body]))
        for piece in pieces[rank]:
            if piece.name in layout.offsets:
                start, end = layout.offsets[piece.name]
                chunks[piece.name].append(
                    Chunk(piece.offsets, piece.shape, f"shard-{rank}", start, end)
                )
    manifest = StepManifest(
        step=1,
        epoch=1,
        attempt="abcd",
        created="2026-01-01T00:00:00Z",
        writer_version="1",
        world_size=world,
        mesh=None,
        fingerprint="",
        base=None,
        export=None,
        tensors=tuple(
            TensorRecord(f"model.t{n}", dtype, tuple(shape), tuple(chunks[f"model.t{n}"]))
            for n, (dtype, shape) in enumerate(specs)
        ),
        files=tuple(files),
        adapter_sha256=None,
        policy_version=None,
    )
    assert StepManifest.from_bytes(manifest.to_bytes(), "x") == manifest


@given(
    st.lists(
        st.tuples(names, st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(1, 5))),
        max_size=8,
        unique_by=lambda spec: spec[0],
    )
)
def test_shard_layouts_are_dense_aligned_and_parse_back(specs) -> None:
    tensors = [
        ShardTensor(name, dtype, tuple(shape[:4]), tuple(shape[:4]), (0,) * len(shape[:4]))
        for name, dtype, shape in specs
    ]
    assume(all(name.isprintable() or "\ud800" not in name for name, _, _ in specs))
    layout = ShardLayout.build(tensors)
    parsed = parse_header(layout.header, layout.size, "x")
    assert list(parsed) == list(layout.offsets)
    assert len(layout.header) % 64 == 0
    position = len(layout.header)
    for tensor in sorted(tensors, key=lambda t: layout.offsets[t.name]):
        start, end = layout.offsets[tensor.name]
        assert (start, end - start) == (position, tensor.nbytes)
        assert start % item_bytes(tensor.dtype) == 0
        assert parsed[tensor.name][:2] == (tensor.dtype, tensor.shape)
        position = end
    assert position == layout.size


state_leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary(max_size=40)
)
hashable = st.none() | st.booleans() | st.integers() | st.text() | st.binary(max_size=8)
state_values = st.recursive(
    state_leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.just("$"), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
        | st.frozensets(hashable, max_size=4)
    ),
    max_leaves=15,
)


def exactly(value: Any) -> Any:
    """A form in which NaN equals itself and 1, 1.0 and True differ."""
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, complex):
        return ("complex", exactly(value.real), exactly(value.imag))
    if isinstance(value, list | tuple):
        return (type(value), [exactly(item) for item in value])
    if isinstance(value, dict):
        return ("dict", [(exactly(k), exactly(v)) for k, v in value.items()])
    return (type(value), value)


@given(state_values)
def test_states_come_back_exactly(value: Any) -> None:
    data = encode_state(value)
    assert exactly(decode_state(data)) == exactly(value)
    json.loads(data)


@given(
    hnp.arrays(
        dtype=hnp.boolean_dtypes()
        | hnp.integer_dtypes(endianness="=")
        | hnp.floating_dtypes(endianness="=")
        | hnp.complex_number_dtypes(endianness="="),
        shape=hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    )
)
def test_arrays_and_their_scalars_come_back(array: np.ndarray) -> None:
    for value in (array, *array.reshape(-1)[:1]):
        again = decode_state(encode_state(value))
        assert type(again) is type(value)
        assert again.dtype == value.dtype
        assert again.shape == value.shape
        assert again.tobytes() == value.tobytes()


@given(st.binary(max_size=200), st.sampled_from(["F32", "BF16", "I64", "U8", "F8_E5M2", "C64"]))
def test_tensors_of_any_bits_come_back(raw: bytes, code: str) -> None:
    dtype = TORCH_DTYPES[code]
    raw = raw[: len(raw) // dtype.itemsize * dtype.itemsize]
    assume(raw)
    tensor = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(dtype)
    again = decode_state(encode_state(tensor))
    assert again.dtype == dtype
    assert bytes(again.view(torch.uint8).numpy()) == raw


def damage(read: Callable[[bytes], object], data: bytes) -> str | None:
    """The message of the DamagedError; None if the bytes were taken. Anything else is a crash."""
    try:
        read(data)
    except DamagedError as error:
        return str(error)
    return None


@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_damage(data: bytes) -> None:
    for read in READERS:
        message = damage(read, data)
        assert message is not None
        assert message.startswith("x: ")


GOOD = [
    (
        StepManifest,
        StepManifest(
            step=1, epoch=1, attempt="abcd", created="2026-01-01T00:00:00Z", writer_version="1",
            world_size=1, mesh=None, fingerprint="", base=None, export=None,
            tensors=(TensorRecord("w", "F32", (2,), (Chunk((0,), (2,), "f", 0, 8),)),),
            files=(FileRecord("f", 8, 1, (1,)),), adapter_sha256=None, policy_version=None,
        ).to_bytes(),
    ),
    (WriterRecord, WriterRecord(2, 1, 3, "h", 1, "2026-01-01T00:00:00Z", "n").to_bytes()),
]  # fmt: skip


@given(st.sampled_from(GOOD), st.integers(0), st.binary(min_size=1, max_size=4), st.booleans())
def test_edited_documents_are_damage(good, at: int, new: bytes, insert: bool) -> None:
    kind, data = good
    at %= len(data)
    edited = data[:at] + new + data[at + (0 if insert else len(new)) :]
    assume(edited != data)
    assert damage(lambda bytes_: kind.from_bytes(bytes_, "x"), edited) is not None


@given(st.dictionaries(st.sampled_from(list(json.loads(GOOD[0][1]))), json_values, min_size=1))
def test_true_hashes_over_false_members_are_damage_or_equal(members: dict[str, Any]) -> None:
    """A forger who can hash still cannot make a reader crash."""
    body = {**json.loads(GOOD[0][1]), **members}
    for fixed in ("format", "schema", "sha256"):
        body.pop(fixed)
    data = seal("ckpt.step", 1, body)
    try:
        manifest = StepManifest.from_bytes(data, "x")
    except DamagedError:
        return
    assert manifest.to_bytes() == data


hostile = st.recursive(
    json_values | st.sampled_from([2**63, 2**63 - 1, -1, 10**18]),
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["$", "v", "dtype", "shape", "data_offsets", "a"]), inner, max_size=5
        )
        | st.lists(inner, max_size=5)
    ),
    max_leaves=12,
)


@given(hostile)
def test_hostile_json_is_damage_or_a_value(value: Any) -> None:
    text = json.dumps(value).encode()
    for data in (
        json.dumps({"format": "ckpt.state", "schema": 1, "value": value}).encode(),
        len(text).to_bytes(8, "little") + text,
    ):
        for read in READERS:
            damage(read, data)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
def test_a_claimed_length_costs_no_memory(length: int, rest: bytes) -> None:
    data = length.to_bytes(8, "little") + rest
    claims = [
        data,
        b'{"format":"ckpt.state","schema":1,"value":{"$":"tensor","v":"","dtype":"F32",'
        b'"shape":[' + str(length % 2**31).encode() + b",65536]}}",
    ]
    tracemalloc.start()
    try:
        for read in READERS:
            for claim in claims:
                damage(read, claim)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 64))
def test_any_cut_of_a_stream_has_one_checksum(pieces: list[bytes], block: int) -> None:
    crc = Crc32Blocks(block=block)
    for piece in pieces:
        crc.update(piece)
    whole = Crc32Blocks(block=block)
    whole.update(b"".join(pieces))
    assert crc.record("x") == whole.record("x")


@given(st.binary(max_size=100), st.binary(max_size=100))
def test_checksums_combine(a: bytes, b: bytes) -> None:
    first, second = file_record("x", [a]).crc32, file_record("x", [b]).crc32
    assert crc32_combine(first, second, len(b)) == file_record("x", [a, b]).crc32


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_grids_tile_and_lose_nothing(parts: list[int], data: st.DataObject) -> None:
    """A grid of cuts tiles its box; without any one of its cells it does not."""
    cuts = [sorted(data.draw(st.sets(st.integers(1, 20), min_size=n, max_size=n))) for n in parts]
    spans = [list(zip([0, *edge[:-1]], edge, strict=True)) for edge in cuts]
    boxes: list[tuple[tuple[int, ...], tuple[int, ...]]] = [((), ())]
    for axis in spans:
        boxes = [((*o, lo), (*s, hi - lo)) for o, s in boxes for lo, hi in axis]
    shape = tuple(edge[-1] for edge in cuts)
    assert tiling_problem(shape, boxes) is None
    gone = data.draw(st.integers(0, len(boxes) - 1))
    rest = boxes[:gone] + boxes[gone + 1 :]
    assert tiling_problem(shape, rest) is not None
    assert tiling_problem(shape, [*boxes, boxes[gone]]) is not None
    assert math.prod(shape) == sum(math.prod(sizes) for _, sizes in boxes)


@given(st.text(max_size=30))
def test_no_text_is_taken_for_another_name(text: str) -> None:
    step = parse_step_dir(text)
    if step is not None:
        assert step_dir(*step).removeprefix("steps/") == text.removeprefix("steps/")
    version = parse_version_name(text)
    if version is not None:
        assert version_name(*version) == text


@given(st.text(max_size=40))
def test_safe_paths_stay_inside(text: str) -> None:
    if path_problem(text) is None:
        parts = text.split("/")
        assert all(part not in {"", ".", ".."} for part in parts)
        assert "\0" not in text
        text.encode()


@given(st.data())
def test_a_lineage_is_a_chain(data: st.DataObject) -> None:
    epochs = data.draw(st.integers(0, 5))
    writers = []
    for epoch in range(1, epochs + 1):
        parent = data.draw(st.none() | st.integers(1, epoch - 1)) if epoch > 1 else None
        step = None if parent is None else data.draw(st.integers(0, 9))
        writers.append(WriterRecord(epoch, parent, step, "h", 1, "2026-01-01T00:00:00Z", "n"))
    steps = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), unique=True))
    lineage = committed_lineage(writers, steps)
    assert len(set(lineage)) == len(lineage)
    assert set(lineage) <= set(steps)
    # Walk the ancestry by hand: who resumed from whom, and where.
    wanted = set()
    epoch, limit = (epochs or None), None
    while epoch is not None:
        wanted |= {(s, e) for s, e in steps if e == epoch and (limit is None or s <= limit)}
        record = writers[epoch - 1]
        epoch, limit = record.parent_epoch, record.parent_step
    assert set(lineage) == wanted
    assert lineage == sorted(lineage, key=lambda pair: (-pair[1], -pair[0]))
