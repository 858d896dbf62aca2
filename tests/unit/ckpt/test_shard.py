"""The shard file: readable by safetensors and by stock DCP, and safe to read from anybody."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ckpt.dtypes import TORCH_DTYPES, dtype_code, item_bytes
from ckpt.errors import DamagedError, PlanError, StateError
from ckpt.layout import shard_name
from ckpt.shard import ALIGNMENT, ShardLayout, ShardTensor, header_size, parse_header

pytestmark = pytest.mark.filterwarnings(
    # torch warns about its own single-process use and about a storage class of its own
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)


def piece(name: str, tensor: torch.Tensor, whole: torch.Size, offsets: tuple[int, ...]):
    return ShardTensor(name, dtype_code(tensor.dtype), tuple(tensor.shape), tuple(whole), offsets)


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def write(
    path, tensors: dict[str, tuple[torch.Tensor, torch.Size, tuple[int, ...]]]
) -> ShardLayout:
    layout = ShardLayout.build([piece(name, *rest) for name, rest in tensors.items()])
    data = bytearray(layout.size)
    data[: len(layout.header)] = layout.header
    for name, (start, end) in layout.offsets.items():
        data[start:end] = raw(tensors[name][0])
    path.write_bytes(data)
    return layout


def full_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "model.w.lora_a.weight": torch.randn(7, 24),
        "model.w.lora_b.weight": torch.randn(32, 3).to(torch.bfloat16),
        "optim.w.exp_avg": torch.randn(5),
        "optim.w.step": torch.tensor(17.0),
        "model.count": torch.arange(9, dtype=torch.int64).reshape(3, 3),
    }


def split_in_two(directory) -> dict[str, torch.Tensor]:
    """Two shards as FSDP2 makes them: rows split unevenly, a scalar on the first rank alone."""
    state = full_state()
    shards: list[dict] = [{}, {}]
    for name, tensor in state.items():
        if tensor.ndim == 0:
            shards[0][name] = (tensor, tensor.shape, ())
            continue
        rows = (tensor.shape[0] + 1) // 2
        for rank in (0, 1):
            part = tensor[rank * rows : (rank + 1) * rows]
            offsets = (rank * rows, *(0,) * (tensor.ndim - 1))
            shards[rank][name] = (part, tensor.shape, offsets)
    for rank in (0, 1):
        write(directory / shard_name(rank, 2), shards[rank])
    return state


def test_stock_dcp_puts_two_shards_together(tmp_path) -> None:
    state = split_in_two(tmp_path)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor), name


def test_stock_dcp_takes_a_column_split(tmp_path) -> None:
    whole = torch.arange(60, dtype=torch.float32).reshape(6, 10)
    write(tmp_path / shard_name(0, 2), {"w": (whole[:, :7], whole.shape, (0, 0))})
    write(tmp_path / shard_name(1, 2), {"w": (whole[:, 7:], whole.shape, (0, 7))})
    loaded = {"w": torch.zeros_like(whole)}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    assert torch.equal(loaded["w"], whole)


def test_safetensors_reads_a_shard(tmp_path) -> None:
    state = split_in_two(tmp_path)
    with safe_open(tmp_path / shard_name(1, 2), framework="pt") as shard:
        assert set(shard.keys()) == {name for name, t in state.items() if t.ndim}
        assert torch.equal(
            shard.get_tensor("model.w.lora_a.weight"), state["model.w.lora_a.weight"][4:]
        )
        info = json.loads(shard.metadata()["DCP_SHARDING_INFO"])
        assert shard.metadata()["format"] == "pt"
    assert info["model.w.lora_a.weight"] == {"saved_offsets": [4, 0]}


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_every_dtype_goes_through_safetensors(tmp_path, code: str) -> None:
    dtype = TORCH_DTYPES[code]
    tensor = torch.tensor([0, 1, 1, 0], dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    write(tmp_path / "x.safetensors", {"x": (tensor, tensor.shape, (0,))})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as shard:
        assert shard.get_slice("x").get_dtype() == code
        assert shard.get_slice("x").get_shape() == [len(tensor)]
        if code != "F8_E8M0":  # the library knows the code but cannot give it to torch
            assert raw(shard.get_tensor("x")) == raw(tensor)
    assert item_bytes(code) == dtype.itemsize


def test_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(StateError, match=r"torch\.complex128 cannot be stored"):
        dtype_code(torch.complex128)


def test_alignment_and_order() -> None:
    tensors = [
        ShardTensor("odd-bytes", "U8", (3,), (3,), (0,)),
        ShardTensor("big-1", "F32", (16, 4), (32, 4), (0, 0)),
        ShardTensor("odd-doubles", "F64", (3,), (3,), (0,)),
        ShardTensor("big-2", "BF16", (32,), (64,), (32,)),
        ShardTensor("odd-halves", "BF16", (5,), (5,), (0,)),
        ShardTensor("scalar", "F32", (), (), ()),
    ]
    layout = ShardLayout.build(tensors)
    assert list(layout.offsets) == [
        "big-1", "big-2", "odd-doubles", "scalar", "odd-halves", "odd-bytes",
    ]  # fmt: skip
    assert len(layout.header) % ALIGNMENT == 0
    position = len(layout.header)
    for name, (start, end) in layout.offsets.items():
        assert start == position
        tensor = next(t for t in tensors if t.name == name)
        assert end - start == tensor.nbytes
        assert start % (ALIGNMENT if name.startswith("big") else item_bytes(tensor.dtype)) == 0
        position = end
    assert position == layout.size
    assert ShardLayout.build(tensors).header == layout.header


def test_empty_pieces_are_not_stored() -> None:
    layout = ShardLayout.build(
        [
            ShardTensor("none", "F32", (0, 4), (3, 4), (3, 0)),
            ShardTensor("x", "F32", (1,), (1,), (0,)),
        ]
    )
    assert list(layout.offsets) == ["x"]


def test_a_rank_without_data_has_a_valid_file(tmp_path) -> None:
    layout = ShardLayout.build([])
    assert layout.size == len(layout.header)
    (tmp_path / "x.safetensors").write_bytes(layout.header)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as shard:
        assert list(shard.keys()) == []
    assert parse_header(layout.header, layout.size, "x") == {}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (ShardTensor("__metadata__", "F32", (1,), (1,), (0,)), "cannot be named '__metadata__'"),
        (ShardTensor("", "F32", (1,), (1,), (0,)), "cannot be named ''"),
        (ShardTensor("x", "F31", (1,), (1,), (0,)), "'F31' is not a safetensors dtype"),
        (ShardTensor("x", "F32", (2,), (2,), (1,)), "does not lie in a tensor of shape"),
        (ShardTensor("x", "F32", (2,), (2, 1), (0,)), "does not lie in a tensor of shape"),
        (ShardTensor("x", "F32", (-1,), (2,), (0,)), "does not lie in a tensor of shape"),
        (ShardTensor("x\ud800", "F32", (1,), (1,), (0,)), "not valid Unicode"),
    ],
)
def test_impossible_pieces_are_refused(tensor: ShardTensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ShardLayout.build([tensor])


def test_two_pieces_of_one_tensor_are_refused_by_name() -> None:
    pieces = [ShardTensor("w", "F32", (1,), (4,), (at,)) for at in (0, 2)]
    with pytest.raises(PlanError, match="two pieces of w on one rank"):
        ShardLayout.build(pieces)


def test_a_layout_can_be_sent_to_another_process() -> None:
    layout = ShardLayout.build([ShardTensor("x", "F32", (1,), (1,), (0,))])
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout
    with pytest.raises(TypeError):
        again.offsets["x"] = (0, 0)


def test_our_parser_reads_what_the_library_writes(tmp_path) -> None:
    tensors = {"b": torch.ones(3, dtype=torch.float64), "a": torch.ones(2, 2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    data = (tmp_path / "x.safetensors").read_bytes()
    parsed = parse_header(data, len(data), "x")
    assert {name: (entry.dtype, entry.shape) for name, entry in parsed.items()} == {
        "a": ("I8", (2, 2)),
        "b": ("F64", (3,)),
    }
    for name, (_dtype, _shape, start, end) in parsed.items():
        assert data[start:end] == raw(tensors[name])


def build(document: object, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (1,), span: object = (0, 4)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


GOOD = build({"x": entry()}, bytes(4))


def test_the_base_of_the_damage_below_is_good() -> None:
    assert parse_header(GOOD, len(GOOD), "x") == {"x": ("F32", (1,), len(GOOD) - 4, len(GOOD))}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "too few"),
        (b"1234567", "too few"),
        ((2**63).to_bytes(8, "little") + b"{}", "cannot lie in a file"),
        ((101_000_000).to_bytes(8, "little") + b"{}", "cannot lie in a file"),
        ((3).to_bytes(8, "little") + b"{}", "cannot lie in a file"),
        ((0).to_bytes(8, "little") + b"{}", "cannot lie in a file"),
        (build(b"\xff\xfe"), "not JSON"),
        (build(b"{nope}"), "not JSON"),
        (build(b"[" * 100_000), "not JSON"),
        (build(b'{"x":' + b"1" * 5000 + b"}"), "not JSON"),
        (build([1]), "not a JSON object"),
        (build(b'{"a":1,"a":2}'), "twice"),
        (build({"__metadata__": 3}), "not an object of texts"),
        (build({"__metadata__": {"a": 3}}), "not an object of texts"),
        (build({"x": 3}), "needs dtype, shape and data_offsets"),
        (build({"x": {**entry(), "more": 1}}, bytes(4)), "needs dtype, shape and data_offsets"),
        (build({"x": entry(dtype="F31")}, bytes(4)), "unknown dtype"),
        (build({"x": entry(dtype=["F32"])}, bytes(4)), "unknown dtype"),
        (build({"x": entry(shape=[-1])}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(shape=[True])}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(shape=[1.0])}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(shape=[2**70])}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(shape=[1] * 65)}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(shape="1")}, bytes(4)), "not a list of sizes"),
        (build({"x": entry(span=[0])}, bytes(4)), "not two positions"),
        (build({"x": entry(span=[-4, 0])}, bytes(4)), "not two positions"),
        (build({"x": entry(span=[4, 0])}, bytes(4)), "do not hold"),
        (build({"x": entry(shape=[2])}, bytes(4)), "do not hold"),
        (build({"x": entry(shape=[2**62] * 64)}, bytes(4)), "do not hold"),
        (build({"x": entry(span=[4, 8])}, bytes(8)), "begins at byte"),
        (build({"x": entry(), "y": entry()}, bytes(8)), "begins at byte"),
        (build({"x": entry()}, bytes(5)), "the tensors end at byte"),
        (build({"x": entry()}, bytes(3)), "the tensors end at byte"),
    ],
)
def test_damaged_headers_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(DamagedError, match=message) as caught:
        parse_header(data, len(data), "some/file")
    assert str(caught.value).startswith("some/file: ")
    assert len(str(caught.value)) < 600


def test_a_header_may_be_read_alone() -> None:
    size = header_size(GOOD[:8], len(GOOD), "x")
    assert parse_header(GOOD[:size], len(GOOD), "x") == parse_header(GOOD, len(GOOD), "x")
    with pytest.raises(DamagedError, match="only"):
        parse_header(GOOD[: size - 1], len(GOOD), "x")
