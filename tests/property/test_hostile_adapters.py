"""PEFT directories from anywhere: a warm start takes them over, or refuses with an own error."""

from __future__ import annotations

import json
import math
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support.tiny_run import EXPORT, Tiny

import ckpt
from ckpt import CkptError, TrainState

A, B = (f"base_model.model.lin.lora_{side}.weight" for side in "AB")
GOOD = save({A: torch.ones(3, 6), B: torch.full((5, 3), 2.0)})
HEADER = 8 + int.from_bytes(GOOD[:8], "little")
MEMORY = 3_000_000

short = settings(deadline=None, max_examples=60, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)


def taken_over(config: bytes, weights: bytes) -> Tiny | None:
    """The model after a warm start, or None where it was refused and nothing was touched."""
    model = Tiny(seed=4)
    before = [parameter.clone() for parameter in model.parameters()]
    with tempfile.TemporaryDirectory(prefix="adapter-") as folder:
        Path(folder, "adapter_config.json").write_bytes(config)
        Path(folder, "adapter_model.safetensors").write_bytes(weights)
        tracemalloc.start()
        try:
            ckpt.warm_start(TrainState(model, export=EXPORT), folder)
        except CkptError:
            assert all(map(torch.equal, before, model.parameters()))
            return None
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < MEMORY
    return model


def config(**fields: object) -> bytes:
    return json.dumps({**EXPORT.peft_config, **fields}).encode()


@pytest.fixture(scope="module", autouse=True)
def _imports_are_done():
    assert taken_over(config(), GOOD) is not None


@short
@given(st.sampled_from([*EXPORT.peft_config, "rank_pattern", "alpha_pattern", "x"]), values)
def test_any_value_in_any_field(field, value):
    model = taken_over(config(**{field: value}), GOOD)
    if model is not None:
        assert torch.equal(model.a, torch.ones(3, 6))
        assert bool(torch.isfinite(model.b).all())


@short
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_as_a_file(data, as_config):
    found = taken_over(data, GOOD) if as_config else taken_over(config(), data)
    assert found is None


@short
@given(st.integers(0, HEADER - 1), st.integers(0, 255))
def test_any_byte_of_the_header(at, byte):
    data = bytearray(GOOD)
    data[at] = byte
    model = taken_over(config(), bytes(data))
    if model is not None:  # the byte was the same, or lies in a name that nobody reads
        assert math.isfinite(model.a.sum().item())


@short
@given(st.lists(st.tuples(st.text(max_size=8), st.integers(-3, 2**63)), max_size=3), st.data())
def test_any_header(entries, data):
    header = {
        name: {
            "dtype": data.draw(st.sampled_from(["F32", "BF16", "U8", "X"])),
            "shape": [size],
            "data_offsets": [0, size],
        }
        for name, size in entries
    }
    text = json.dumps(header).encode()
    assert taken_over(config(), len(text).to_bytes(8, "little") + text + b"\0" * 16) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"lora_alpha": 10**400},
        {"alpha_pattern": {"lin": 10**400}},
        {"r": 10**400},
        {"rank_pattern": {"lin": 2**70}},
        {"alpha_pattern": {"lin(": 3}},
        {"lora_alpha": 1e-320},
        {"use_rslora": "yes"},
    ],
    ids=lambda fields: f"{fields}"[:40],
)
def test_numbers_and_patterns_at_the_edge(fields):
    model = taken_over(config(**fields), GOOD)
    assert model is None or torch.isfinite(model.b).all()


def test_a_deeply_nested_configuration():
    assert taken_over(b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}", GOOD) is None
