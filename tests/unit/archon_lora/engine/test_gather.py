"""What ranks hold must make up every tensor exactly once, or nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from archon_lora.engine.gather import Gather, _catalogue, dtype_name, dtype_named, tensor_bytes
from archon_lora.errors import AdapterMismatch

Chunks = list[tuple[list[int], list[int]]]


def _held(*ranks: Chunks, shape: tuple[int, ...] = (4, 2)) -> list[dict[str, Any]]:
    return [{"w": {"shape": list(shape), "dtype": "float32", "chunks": chunks}} for chunks in ranks]


def test_the_lowest_rank_that_holds_a_box_sends_it() -> None:
    top, bottom = ([0, 0], [2, 2]), ([2, 0], [2, 2])
    whole = _catalogue(_held([top], [bottom], [top], [bottom]))["w"]
    assert [(box.owner, box.offsets) for box in whole.boxes] == [(0, (0, 0)), (1, (2, 0))]


@pytest.mark.parametrize(
    "ranks",
    [
        ([([0, 0], [2, 2])], []),
        ([([0, 0], [2, 2])], [([1, 0], [2, 2])]),
        ([([0, 0], [3, 2])], [([2, 0], [2, 2])]),
        ([], []),
    ],
    ids=["hole", "overlap of the right size", "overlap", "nothing"],
)
def test_pieces_that_do_not_make_up_the_tensor_are_refused(ranks: tuple[Chunks, ...]) -> None:
    with pytest.raises(AdapterMismatch, match=r"the pieces of w do not cover its shape \(4, 2\)"):
        _catalogue(_held(*ranks))


def test_ranks_that_disagree_about_a_tensor_are_refused() -> None:
    held = _held([([0, 0], [4, 2])]) + _held([([0, 0], [4, 3])], shape=(4, 3))
    with pytest.raises(AdapterMismatch, match=r"\(4, 2\) on an earlier rank, .* on rank 1"):
        _catalogue(held)


def test_one_process_passes_tensors_on_in_order_and_as_copies() -> None:
    tensors = {
        "b": torch.arange(6.0).view(2, 3).t(),
        "a": torch.tensor(1.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }
    gather = Gather(tensors, None, timeout=1)
    assert list(gather.catalogue) == ["a", "b", "empty"]
    got = dict(gather)
    for name, tensor in tensors.items():
        assert torch.equal(got[name], tensor)
        assert got[name].is_contiguous()
    got["b"].zero_()
    assert tensors["b"].any()
    gather.drain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_bytes_are_the_row_major_ones(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype).t()
    data = tensor_bytes(tensor)
    assert torch.equal(torch.frombuffer(data, dtype=dtype).view(3, 2), tensor)
    assert dtype_named(dtype_name(dtype)) == dtype


def test_a_name_that_is_no_dtype_is_refused() -> None:
    with pytest.raises(TypeError, match="'nn' names no torch dtype"):
        dtype_named("nn")
