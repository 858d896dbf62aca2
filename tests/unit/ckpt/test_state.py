"""Training state as JSON: exact, and only of what can be exact."""

from __future__ import annotations

import base64
import enum
import json
import math
import random
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from ckpt.dtypes import TORCH_DTYPES
from ckpt.errors import DamagedError, StateError
from ckpt.state import MAX_TENSOR_BYTES, decode_state, encode_state


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, all the way down; NaN equals the same NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack(">d", a) == struct.pack(">d", b)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    if isinstance(a, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
        )
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return bool(a == b)


VALUES = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    -(2**63),
    2**63,
    -(2**200),
    10**5000,
    0.1,
    -0.0,
    1e300,
    5e-324,
    1.0,
    math.inf,
    -math.inf,
    math.nan,
    struct.unpack(">d", bytes.fromhex("fff8000000000abc"))[0],
    1 + 2j,
    complex(math.nan, -0.0),
    "",
    "text \n\0é模\U0001f600",
    "\ud800",
    "\ud83d\ude00",
    b"",
    b"\x00\xff",
    bytearray(b"ab"),
    [],
    [1, [2.0, ["x"]]],
    (),
    (1,),
    (1, (2, [3])),
    set(),
    {1, "a", (2, 3)},
    frozenset({1, 2}),
    {},
    {"a": 1, "b": {"c": [None]}},
    {1: "int", "1": "text", 1.5: 0, (1, 2): 3, None: 4},
    {"$": "tuple", "v": [1]},
    {"é": 1, "\ud800": 2},
    OrderedDict(b=1, a=2),
    Counter([1, 1, 2]),
    torch.Size([2, 3]),
    torch.float32,
    torch.bfloat16,
    torch.tensor(3.5),
    torch.arange(6).reshape(2, 3),
    torch.arange(6).reshape(2, 3).t(),
    torch.empty(0, 3),
    torch.tensor([math.nan, math.inf]),
    torch.tensor([True, False]),
    np.float32(1.5),
    np.float64(math.nan),
    np.int64(-3),
    np.bool_(True),
    np.str_("text"),
    np.array(3.5),
    np.arange(6, dtype=np.int16).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.empty((0, 2)),
    np.array(["a", "bcd"]),
    np.array([1, 2], dtype=">i4"),
]


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_round_trip_is_exact(value: Any) -> None:
    data = encode_state(value)
    assert same(decode_state(data), value)
    json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert encode_state(decode_state(data)) == data


@pytest.mark.parametrize("code", TORCH_DTYPES)
def test_tensors_of_every_dtype(code: str) -> None:
    dtype = TORCH_DTYPES[code]
    tensor = torch.tensor([0, 1, 1], dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
    assert same(decode_state(encode_state(tensor)), tensor)


def test_random_states_go_on_as_before() -> None:
    python, torch_rng, numpy_rng = random.Random(5), torch.Generator().manual_seed(5), None
    numpy_rng = np.random.default_rng(5)
    legacy = np.random.RandomState(5)
    state = {
        "python": python.getstate(),
        "torch": torch_rng.get_state(),
        "numpy": numpy_rng.bit_generator.state,
        "legacy": legacy.get_state(),
    }
    again = decode_state(encode_state(state))
    wanted = (
        python.random(),
        torch.rand(3, generator=torch_rng),
        numpy_rng.random(),
        legacy.rand(),
    )
    python.setstate(again["python"])
    torch_rng.set_state(again["torch"])
    numpy_rng.bit_generator.state = again["numpy"]
    legacy.set_state(again["legacy"])
    assert python.random() == wanted[0]
    assert torch.equal(torch.rand(3, generator=torch_rng), wanted[1])
    assert numpy_rng.random() == wanted[2]
    assert legacy.rand() == wanted[3]


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # no optimizer step is made
def test_schedulers_of_torch_go_through() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedules = [
        torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3, 3]),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10, cycle_momentum=False),
    ]
    for schedule in schedules:
        state = schedule.state_dict()
        assert same(decode_state(encode_state(state)), state)


def test_a_tensor_loses_its_gradient_flag_only() -> None:
    tensor = torch.ones(2, requires_grad=True)
    again = decode_state(encode_state(tensor))
    assert torch.equal(again, tensor)
    assert not again.requires_grad


def test_decoded_tensors_and_arrays_are_writable() -> None:
    tensor, array = decode_state(encode_state([torch.zeros(2), np.zeros(2)]))
    tensor += 1
    array += 1
    assert tensor.tolist() == array.tolist() == [1.0, 1.0]


def test_the_order_of_a_set_does_not_show() -> None:
    up: set[int] = set()
    down: set[int] = set()
    for number in (0, 8):  # equal in the hash table's low bits: the first one in comes first
        up.add(number)
        down.add(8 - number)
    assert list(up) != list(down)  # else this shows nothing
    assert encode_state(up) == encode_state(down)


class Colour(enum.IntEnum):
    RED = 1


Point = namedtuple("Point", "x y")


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]"),
        ({"a": {3: lambda: 1}}, r"state\['a'\]\[3\]"),
        (Colour.RED, "state"),
        (Point(1, 2), "state"),
        (Text("x"), "state"),
        (defaultdict(int), "state"),
        ({object(): 1}, "state key"),
        (torch.nn.Parameter(torch.ones(1)), "state"),
        (torch.ones(1).to_sparse(), "state"),
        (torch.ones(1, device="meta"), "state"),
        (torch.ones(1, dtype=torch.complex128), "state"),
        (np.array([object()]), "state"),
        (np.datetime64("2026-01-01"), "state"),
        (np.zeros(2, dtype=[("a", "i4")]), "state"),
        (range(3), "state"),
    ],
)
def test_what_cannot_be_exact_is_named(value: object, path: str) -> None:
    with pytest.raises(StateError, match=f"^{path}: "):
        encode_state(value)


def test_big_tensors_belong_elsewhere() -> None:
    big = torch.zeros(MAX_TENSOR_BYTES + 1, dtype=torch.uint8)
    with pytest.raises(StateError, match=r"state\['x'\]: a tensor of 16777217 bytes is too big"):
        encode_state({"x": big})
    with pytest.raises(StateError, match="too big"):
        encode_state(big.numpy())


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StateError, match="contains itself"):
        encode_state(loop)


def document(value: object) -> bytes:
    return json.dumps({"format": "ckpt.state", "schema": 1, "value": value}).encode()


def tagged(kind: object, v: object, **more: object) -> bytes:
    return document({"$": kind, "v": v, **more})


FOUR = base64.b64encode(bytes(4)).decode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"format":"ckpt.state","schema":2,"value":1}',
        b'{"format":"ckpt.state","schema":1}',
        b'{"format":"ckpt.state","schema":1,"value":1,"more":2}',
        b'{"format":"ckpt.state","schema":1,"value":NaN}',
        b'{"format":"ckpt.state","schema":1,"value":1e999}',
        document(json.loads("[" * 900 + "]" * 900)),
        tagged("what", 1),
        tagged(3, 1),
        tagged(None, 1),
        tagged("tuple", 1),
        tagged("tuple", [], more=1),
        tagged("dict", [[1]]),
        tagged("dict", [[[1], 2]]),
        tagged("dict", [[1, 2], [1, 3]]),
        tagged("dict", [["ab"]]),
        tagged("dict", ["ab"]),
        tagged("set", [[1]]),
        tagged("float", "00"),
        tagged("float", "zz"),
        tagged("float", 3),
        tagged("complex", [1.0]),
        tagged("complex", [1.0, "x"]),
        tagged("int", "zz"),
        tagged("int", 3),
        tagged("str", "!!"),
        tagged("bytes", "é"),
        tagged("bytes", 3),
        tagged("bytes", "a"),
        tagged("dtype", "F31"),
        tagged("dtype", [1]),
        tagged("size", ["x"]),
        tagged("tensor", FOUR),
        tagged("tensor", FOUR, dtype="F32", shape=[2]),
        tagged("tensor", FOUR, dtype="F31", shape=[1]),
        tagged("tensor", FOUR, dtype=["F32"], shape=[1]),
        tagged("tensor", FOUR, dtype="F32", shape=[-1]),
        tagged("tensor", FOUR, dtype="F32", shape=[True]),
        tagged("tensor", FOUR, dtype="F32", shape="1"),
        tagged("tensor", "", dtype="F32", shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
        tagged("tensor", "", dtype="F32", shape=[0] * 65),
        tagged("tensor", base64.b64encode(b"\x02").decode(), dtype="BOOL", shape=[1]),
        tagged("ndarray", FOUR, dtype="O", shape=[1]),
        tagged("ndarray", FOUR, dtype="|O8", shape=[1]),
        tagged("ndarray", FOUR, dtype="i4", shape=[1]),
        tagged("ndarray", FOUR, dtype="<i4,<i4", shape=[1]),
        tagged("ndarray", FOUR, dtype=["<i4"], shape=[1]),
        tagged("ndarray", FOUR, dtype="<i3", shape=[1]),
        tagged("ndarray", FOUR, dtype="<i4", shape=[3]),
        tagged("ndarray", "", dtype="<i4", shape=[0, 2**31 - 1, 2**31 - 1, 2**31 - 1]),
    ],
    ids=lambda data: repr(data[-60:]),
)
def test_foreign_bytes_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedError, match=r"^where: cannot be read as training state: "):
        decode_state(data, "where")
