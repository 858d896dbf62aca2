"""Any state, saved in any sharding, comes back bit for bit in any other; without a process more."""

from __future__ import annotations

import itertools
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ckpt.checksum import Crc32Blocks
from ckpt.dtypes import TORCH_DTYPES, item_bytes
from ckpt.errors import DamagedError, PlanError
from ckpt.fetch import fetch
from ckpt.job import located
from ckpt.layout import shard_name
from ckpt.manifest import StepManifest
from ckpt.plan import Piece, assign, shard_layout, tensor_records
from ckpt.storage import open_storage

settings.register_profile("resharding", deadline=None, max_examples=80, derandomize=True)
resharding = settings.get_profile("resharding")

BLOCK = 64
"""Bytes of a checksum's block here, so that small files have many."""
CODES = ["F32", "BF16", "I64", "U8", "F64", "BOOL"]


@dataclass(frozen=True)
class Mesh:
    """Ranks in a grid, row-major; what each axis does with a tensor is the tensor's own choice."""

    shape: tuple[int, ...]

    @property
    def world(self) -> int:
        return math.prod(self.shape)

    def coordinates(self, rank: int) -> tuple[int, ...]:
        return list(itertools.product(*map(range, self.shape)))[rank]


Placement = tuple[int | None, ...]
"""For each axis of the mesh the dimension that it shards, or None: a replica."""


def box(
    shape: tuple[int, ...], mesh: Mesh, placement: Placement, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) of a rank's part; one axis after the other cuts as ``torch.chunk`` does."""
    offsets, sizes = [0] * len(shape), list(shape)
    for parts, at, dim in zip(mesh.shape, mesh.coordinates(rank), placement, strict=True):
        if dim is None:
            continue
        width = -(-sizes[dim] // parts)
        low = min(at * width, sizes[dim])
        offsets[dim] += low
        sizes[dim] = min(width, sizes[dim] - low)
    return tuple(offsets), tuple(sizes)


def pieces(
    tensors: dict[str, torch.Tensor], mesh: Mesh, placements: dict[str, Placement], rank: int
) -> list[Piece]:
    found = []
    for name, tensor in tensors.items():
        code = next(code for code, dtype in TORCH_DTYPES.items() if dtype == tensor.dtype)
        shape, placement = tuple(tensor.shape), placements[name]
        sharded = any(dim is not None for dim in placement)
        found.append(Piece(name, code, shape, *box(shape, mesh, placement, rank), sharded))
    return found


def cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    region = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
    return tensor[region]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@st.composite
def states(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """A few tensors of random bits, scalars and empty ones among them."""
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number in range(draw(st.integers(1, 4))):
        code = draw(st.sampled_from(CODES))
        shape = draw(st.lists(st.integers(0, 9), max_size=3))
        count = math.prod(shape) * (item_bytes(code) or 0)
        top = 2 if code == "BOOL" else 256
        data = torch.randint(0, top, (count,), generator=generator, dtype=torch.uint8)
        tensors[f"model.t{number}"] = data.view(TORCH_DTYPES[code]).view(shape)
    return tensors


meshes = st.sampled_from([(1,), (2,), (3,), (4,), (2, 2), (2, 3), (1, 4), (8,)]).map(Mesh)


def placed(draw: st.DrawFn, tensors: dict[str, torch.Tensor], mesh: Mesh) -> dict[str, Placement]:
    """A placement of each tensor that puts one contiguous box on every rank."""
    return {
        name: tuple(
            draw(st.none() | st.integers(0, tensor.dim() - 1)) if tensor.dim() else None
            for _axis in mesh.shape
        )
        for name, tensor in tensors.items()
    }


@st.composite
def sharded(draw: st.DrawFn, tensors: dict[str, torch.Tensor]) -> tuple[Mesh, dict[str, Placement]]:
    mesh = draw(meshes)
    return mesh, placed(draw, tensors, mesh)


def save(
    root: str, tensors: dict[str, torch.Tensor], mesh: Mesh, placements: dict[str, Placement]
) -> StepManifest:
    """What the ranks of a mesh write, and the manifest over it."""
    storage = open_storage(root)
    held = [pieces(tensors, mesh, placements, rank) for rank in range(mesh.world)]
    assigned = assign(held)
    files = {}
    for rank, mine in enumerate(assigned):
        layout = shard_layout(mine)
        if layout is None:
            continue
        content = bytearray(layout.size)
        content[: len(layout.header)] = layout.header
        for piece in mine:
            start, end = layout.offsets[piece.name]
            content[start:end] = raw(cut(tensors[piece.name], piece))
        crc = Crc32Blocks(block=BLOCK)
        crc.update(content)
        name = shard_name(rank, mesh.world)
        files[rank] = crc.record(name)
        storage.put(f"step/{name}", bytes(content))
    return StepManifest(
        step=1,
        epoch=1,
        attempt="abcd",
        created="2026-01-01T00:00:00Z",
        writer_version="1",
        world_size=mesh.world,
        mesh=None,
        fingerprint="",
        base=None,
        export=None,
        tensors=located(tensor_records(held[0], assigned), files),
        files=tuple(files.values()),
        adapter_sha256=None,
        policy_version=None,
    )


@resharding
@given(st.data())
def test_a_resharded_state_is_the_same_to_the_last_bit(data: st.DataObject) -> None:
    tensors = data.draw(states())
    mesh, placements = data.draw(sharded(tensors))
    later, others = data.draw(sharded(tensors))
    with (
        tempfile.TemporaryDirectory() as root,
        mock.patch("ckpt.checksum.BLOCK_BYTES", BLOCK),
        mock.patch("ckpt.fetch.BLOCK_BYTES", BLOCK),
    ):
        manifest = save(root, tensors, mesh, placements)
        stored = sum(c.end - c.start for record in manifest.tensors for c in record.chunks)
        assert stored == sum(tensor.nbytes for tensor in tensors.values()), "each byte once"
        for rank in range(later.world):
            wanted = pieces(tensors, later, others, rank)
            found = fetch(
                open_storage(root), "step", manifest, wanted, rank=rank, world=later.world
            )
            for piece in wanted:
                value = found[piece.name]
                assert value.dtype == tensors[piece.name].dtype
                assert tuple(value.shape) == piece.sizes
                assert raw(value) == raw(cut(tensors[piece.name], piece)), piece


@resharding
@given(st.data())
def test_one_wrong_bit_is_seen_by_a_rank_that_reads_it(data: st.DataObject) -> None:
    """Whatever the new sharding: the ranks together read every byte of every shard."""
    tensors = data.draw(states())
    mesh, placements = data.draw(sharded(tensors))
    later, others = data.draw(sharded(tensors))
    with (
        tempfile.TemporaryDirectory() as root,
        mock.patch("ckpt.checksum.BLOCK_BYTES", BLOCK),
        mock.patch("ckpt.fetch.BLOCK_BYTES", BLOCK),
    ):
        manifest = save(root, tensors, mesh, placements)
        assume(manifest.files)
        path = Path(root, "step", data.draw(st.sampled_from(manifest.files)).name)
        content = bytearray(path.read_bytes())
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        refused = 0
        for rank in range(later.world):
            wanted = pieces(tensors, later, others, rank)
            try:
                found = fetch(
                    open_storage(root), "step", manifest, wanted, rank=rank, world=later.world
                )
            except DamagedError:
                refused += 1
                continue
            for piece in wanted:
                assert raw(found[piece.name]) == raw(cut(tensors[piece.name], piece))
        assert refused


def test_a_tensor_that_no_rank_holds_whole_is_refused() -> None:
    tensor = {"model.t": torch.zeros(4, 2)}
    held = [pieces(tensor, Mesh((2,)), {"model.t": (0,)}, 0)] * 2
    with pytest.raises(PlanError, match="gap"):
        assign(held)
