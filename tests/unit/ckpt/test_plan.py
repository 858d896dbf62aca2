"""Planning, the arena and the partial reads of a restore, without processes."""

from __future__ import annotations

import gc
import math
import weakref
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from ckpt.arena import Arena, Slot
from ckpt.checksum import file_record
from ckpt.dtypes import TORCH_DTYPES
from ckpt.envelope import utc_now
from ckpt.errors import DamagedError, PlanError, SaveAborted
from ckpt.fetch import DENSE, fetch, fetch_pieces
from ckpt.fingerprint import fingerprint
from ckpt.job import TensorTable, compose_state, located
from ckpt.manifest import StepManifest
from ckpt.plan import (
    Piece,
    assign,
    difference,
    local_pieces,
    shard_layout,
    tensor_records,
)
from ckpt.slot_source import SlotSource
from ckpt.state import decode_state, encode_state
from ckpt.storage import open_storage


def cut(name, value, parts, dim):
    """A tensor split along a dimension as DTensor does it: equal parts, then what is left."""
    extent = value.shape[dim]
    width = -(-extent // parts)
    pieces = []
    for part in range(parts):
        low, high = min(part * width, extent), min((part + 1) * width, extent)
        offsets = tuple(low if d == dim else 0 for d in range(value.dim()))
        sizes = tuple(high - low if d == dim else n for d, n in enumerate(value.shape))
        code = next(c for c, t in TORCH_DTYPES.items() if t == value.dtype)
        pieces.append(Piece(name, code, tuple(value.shape), offsets, sizes, True))
    return pieces


def values_of(pieces, tensors):
    return [
        tensors[p.name][tuple(slice(o, o + n) for o, n in zip(p.offsets, p.sizes, strict=True))]
        for p in pieces
    ]


def write_step(root, tensors, held):
    """Write the shards of every rank as a save does; returns storage and manifest."""
    assigned = assign(held)
    storage, records = open_storage(root), {}
    for rank, mine in enumerate(assigned):
        layout = shard_layout(mine)
        if layout is None:
            continue
        slot = Slot(layout, mine, pinned=False)
        slot.fill(values_of(mine, tensors), None)
        storage.put(f"s/{rank}.safetensors", slot.buffer())
        records[rank] = file_record(f"{rank}.safetensors", [slot.buffer()])
    manifest = StepManifest(
        step=1,
        epoch=1,
        attempt="abcd",
        created=utc_now(),
        writer_version="0",
        world_size=len(held),
        mesh=None,
        fingerprint="f",
        base=None,
        export=None,
        tensors=located(tensor_records(held[0], assigned), records),
        files=tuple(records.values()),
        adapter_sha256=None,
        policy_version=None,
    )
    manifest.to_bytes()
    return storage, manifest


@st.composite
def topologies(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    dims = st.integers(0, len(shape) - 1)
    return shape, draw(st.integers(1, 5)), draw(dims), draw(st.integers(1, 5)), draw(dims)


@settings(max_examples=60, deadline=None)
@given(
    topologies(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
    st.integers(16, 4096),
    st.sampled_from([0.0, DENSE, 2.0]),
)
def test_any_split_is_read_back_under_any_other(tmp_path_factory, topology, dtype, block, dense):
    """Values survive a change of the number of ranks and of the dimension that is split."""
    shape, old, old_dim, new, new_dim = topology
    value = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    tensors = {"model.w": value}
    root = tmp_path_factory.mktemp("plan")
    # Small blocks, so that ranges cross them.
    with (
        mock.patch.multiple("ckpt.checksum", BLOCK_BYTES=block),
        mock.patch.multiple("ckpt.fetch", BLOCK_BYTES=block, DENSE=dense),
        mock.patch("ckpt.checksum.Crc32Blocks.__init__.__defaults__", (block,)),
    ):
        storage, manifest = write_step(
            root, tensors, [[piece] for piece in cut("model.w", value, old, old_dim)]
        )
        for rank, piece in enumerate(cut("model.w", value, new, new_dim)):
            found = fetch(storage, "s", manifest, [piece], rank=rank, world=new)
            (want,) = values_of([piece], tensors)
            assert torch.equal(found["model.w"], want)


@pytest.mark.parametrize(("wanted", "memories"), [("ab", 1), ("b", 0)])
def test_only_what_is_mostly_needed_stays_in_memory_as_it_is_read(tmp_path, wanted, memories):
    tensors = {"model.a": torch.arange(1000.0), "model.b": torch.arange(100.0)}
    held = [p for name, value in tensors.items() for p in cut(name, value, 1, 0)]
    storage, manifest = write_step(tmp_path, tensors, [held])
    pieces = [piece for piece in held if piece.name[-1] in wanted]
    with mock.patch("ckpt.fetch._memory", side_effect=lambda n: memoryview(bytearray(n))) as made:
        found = fetch(storage, "s", manifest, pieces, rank=1, world=2)
    assert made.call_count == memories
    for piece in pieces:
        assert torch.equal(found[piece.name], tensors[piece.name])


@pytest.mark.parametrize("dense", [0.0, 2.0])
def test_a_flipped_bit_anywhere_in_a_shard_is_found_by_some_rank(tmp_path, dense):
    """Also in a header that fills blocks of its own, which no tensor's bytes lie in."""
    value = torch.arange(12.0).reshape(4, 3)
    held = [[piece] for piece in cut("model.w", value, 2, 0)]
    with (
        mock.patch.multiple("ckpt.checksum", BLOCK_BYTES=32),
        mock.patch.multiple("ckpt.fetch", BLOCK_BYTES=32, DENSE=dense),
        mock.patch("ckpt.checksum.Crc32Blocks.__init__.__defaults__", (32,)),
    ):
        storage, manifest = write_step(tmp_path, {"model.w": value}, held)
        data = storage.read("s/1.safetensors")
        for position in range(0, len(data), 7):
            changed = bytearray(data)
            changed[position] ^= 1
            storage.put("s/1.safetensors", bytes(changed))
            found = []
            for rank in range(2):
                try:
                    fetch(storage, "s", manifest, held[rank], rank=rank, world=2)
                except DamagedError:
                    found.append(rank)
            assert found, position


def test_replicas_are_written_once_and_spread():
    held = [
        [Piece(f"t{n}", "F32", (4,), (0,), (4,), False) for n in range(4)] for _rank in range(2)
    ]
    assigned = assign(held)
    assert sorted(p.name for mine in assigned for p in mine) == ["t0", "t1", "t2", "t3"]
    assert [len(mine) for mine in assigned] == [2, 2]


def test_what_is_whole_goes_to_ranks_that_have_room():
    """Tensor parallelism: one factor is split, the other one is whole on every rank."""
    ranks = range(4)
    held = [
        [
            piece
            for n in range(12)
            for piece in (
                Piece(f"b{n}", "F32", (40, 4), (10 * rank, 0), (10, 4), True),
                Piece(f"a{n}", "F32", (4, 30), (0, 0), (4, 30), True),
                # Two of the ranks hold another copy of a large one: they have less room.
                *([Piece(f"c{n}", "F32", (9, 9), (0, 0), (9, 9), True)] if rank < 2 else []),
            )
        ]
        for rank in ranks
    ]
    assigned = assign(held, parted=True)
    names = sorted(p.name for mine in assigned for p in mine)
    once = [f"{x}{n}" for x in "ac" for n in range(12)]
    assert names == sorted([*once, *[f"b{n}" for n in range(12)] * 4])
    loads = [sum(math.prod(p.sizes) for p in mine) for mine in assigned]
    assert max(loads) < 1.1 * min(loads)
    assert [len([p for p in mine if p.name[0] == "b"]) for mine in assigned] == [12] * 4


def test_empty_pieces_are_not_stored_and_empty_tensors_are_known():
    held = [
        [p, Piece("none", "F32", (0, 3), (0, 0), (0, 3), False)]
        for p in cut("w", torch.zeros(1, 2), 2, 0)
    ]
    assigned = assign(held)
    assert [[p.name for p in mine] for mine in assigned] == [["w"], []]
    records = {r.name: r for r in tensor_records(held[0], assigned)}
    assert records["none"].chunks == ()
    assert shard_layout([]) is None


def test_a_gap_or_an_overlap_is_refused():
    first = Piece("w", "F32", (4,), (0,), (2,), True)
    for other in (
        Piece("w", "F32", (4,), (3,), (1,), True),
        Piece("w", "F32", (4,), (1,), (3,), True),
    ):
        with pytest.raises(PlanError, match="w: the chunks"):
            assign([[first], [other]])


def test_the_first_difference_is_named():
    a = Piece("w", "F32", (4,), (0,), (4,), False)
    assert difference([a], [a], 1) is None
    lacks = difference([a], [], 3)
    assert lacks.startswith("w: rank 0 has it, rank 3 does not (stages of a pipeline are given as")
    for change, words in (
        ({"dtype": "F64"}, "dtype is F32 on rank 0 and F64 on rank 2"),
        ({"shape": (5,)}, "shape is (4,) on rank 0 and (5,) on rank 2"),
        ({"sharded": True}, "sharded is False on rank 0 and True on rank 2"),
    ):
        fields = {
            n: getattr(a, n) for n in ("name", "dtype", "shape", "offsets", "sizes", "sharded")
        }
        assert words in difference([a], [Piece(**{**fields, **change})], 2)


def test_fingerprints_depend_on_everything_the_plan_does():
    base = {"a": torch.zeros(2), "b": torch.zeros(3)}
    prints = {
        fingerprint(base, 1),
        fingerprint(base, 2),
        fingerprint({**base, "b": torch.zeros(4)}, 1),
        fingerprint({**base, "b": torch.zeros(3, dtype=torch.float64)}, 1),
        fingerprint({"a": base["a"], "c": base["b"]}, 1),
    }
    assert len(prints) == 5
    assert fingerprint({k: v.clone() for k, v in base.items()}, 1) in prints


def test_a_slot_is_the_file(tmp_path):
    tensors = {
        "f": torch.randn(3, 5),
        "h": torch.randn(7).bfloat16(),
        "t": torch.randn(4, 6).t(),  # not contiguous
        "n": torch.tensor(5),
        "m": torch.tensor([True, False, True]),
    }
    pieces = local_pieces(tensors)
    slot = Slot(shard_layout(pieces), pieces, pinned=False)
    slot.fill(list(tensors.values()), None)
    stored = load(bytes(slot.buffer()))
    for name, tensor in tensors.items():
        assert torch.equal(stored[name], tensor), name
    with pytest.raises(PlanError, match="changed after planning"):
        slot.fill([torch.zeros(1)] * len(pieces), None)


def test_bytes_of_a_slot_stay_in_memory_while_anybody_has_a_view_of_them():
    pieces = local_pieces({"f": torch.zeros(2)})
    slot = Slot(shard_layout(pieces), pieces, pinned=False)
    memory = weakref.ref(slot._memory)
    view = slot.buffer()[8:16]
    del slot
    gc.collect()
    assert memory() is not None
    del view
    gc.collect()
    assert memory() is None


def test_lent_slots_come_back_as_slots():
    """Also where the borrower fails; until then no save gets them."""
    pieces = local_pieces({"f": torch.arange(3.0), "n": torch.tensor(5)})
    arena = Arena(shard_layout(pieces), pieces, pinned=False)

    def borrow():
        with arena.lent() as memory:
            assert not arena.available()
            for view in memory:
                view[:] = b"x" * len(view)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        borrow()
    for slot in (arena.acquire(1), arena.acquire(1)):
        slot.fill([torch.arange(3.0), torch.tensor(5)], None)
        assert torch.equal(load(bytes(slot.buffer()))["f"], torch.arange(3.0))


def test_values_are_put_into_spare_memory_as_far_as_it_goes(tmp_path):
    value = torch.arange(1.0, 1001.0)
    pieces = cut("model.a", value, 2, 0)
    storage, manifest = write_step(tmp_path, {"model.a": value}, [[piece] for piece in pieces])
    spare = [memoryview(bytearray(8)), memoryview(bytearray(manifest.files[0].size + 8))]
    with mock.patch("ckpt.fetch._memory", side_effect=lambda n: memoryview(bytearray(n))) as made:
        found = fetch_pieces(storage, "s", manifest, pieces, share=(0, 1), spare=spare)
    assert made.call_count == 1  # for the other file
    assert torch.equal(torch.cat(found), value)
    spare[1][:] = bytes(len(spare[1]))
    assert [bool(part.any()) for part in found] == [False, True]


def test_slots_come_and_go_with_a_deadline():
    pieces = local_pieces({"f": torch.zeros(2)})
    arena = Arena(shard_layout(pieces), pieces, pinned=False)
    first, second = arena.acquire(1), arena.acquire(1)
    assert first is not second
    assert not arena.available()
    with pytest.raises(SaveAborted, match="both arena slots"):
        arena.acquire(0.05)
    arena.release(first)
    assert arena.acquire(1) is first


def test_dtypes_without_a_code_are_refused():
    from ckpt import StateError

    with pytest.raises(StateError, match="complex128"):
        local_pieces({"z": torch.zeros(1, dtype=torch.complex128)})


def test_state_documents_nest_without_being_decoded():
    shared = {"extra": {"x": (1, 2), "n": float("nan")}, "optimizer": None}
    ranks = [{"r": torch.tensor([1, 2])}, {"r": b"\x00"}]
    data = compose_state(
        {key: encode_state(value) for key, value in shared.items()},
        [encode_state(value).decode() for value in ranks],
    )
    back = decode_state(data)
    assert back["shared"]["extra"]["x"] == (1, 2)
    assert math.isnan(back["shared"]["extra"]["n"])
    assert torch.equal(back["ranks"][0]["r"], ranks[0]["r"])
    assert back["ranks"][1] == {"r": b"\x00"}


def test_a_slot_source_gives_only_what_it_has():
    source = SlotSource([], None, None, None)
    with pytest.raises(DamagedError, match="not part of the snapshot"):
        source.read("other", 0, 1)


def test_the_table_of_tensors_follows_names_and_layouts():
    held = [Piece("model.w", "F32", (4,), (0,), (4,), False)]
    plan = tensor_records(held, assign([held]))
    table = TensorTable()

    def files(name):
        layout = shard_layout(held)
        return {0: file_record(name, [bytes(layout.size)])}

    first = table.located(plan, files("one"))
    assert first == located(plan, files("one"))
    assert table.located(plan, files("one")) is first
    checked = table.checked(first, list(files("one").values()))
    assert table.checked(first, list(files("one").values())) is checked
    # Object stores write every attempt under a prefix of its own.
    second = table.located(plan, files("two"))
    assert [chunk.file for record in second for chunk in record.chunks] == ["two"]
    assert table.checked(second, list(files("two").values())).records is second
    wider = [Piece("model.w", "F32", (8,), (0,), (8,), False)]
    other = tensor_records(wider, assign([wider]))
    assert table.located(other, files("two")) == located(other, files("two"))
