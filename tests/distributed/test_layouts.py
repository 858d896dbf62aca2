"""Every layout of ranks trains alike, and whatever one saved every other restores to the bit.

A run is trained on one layout and saved. Other layouts restore it, save it again before anything is
computed, publish it, and go on. What lies on disk must be the same tensors bit for bit, in as many
files as ranks hold something, once. ``ARCHON_LAYOUTS=full`` takes every pair.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ranks_matrix
from support.engines import tiny_model
from support.moe import write_moe
from support.ranks_matrix import MORE, TRAINED, Job
from support.spawn import run_ranks

from archon_lora.models.parallel_dims import ParallelDims
from ckpt.fetch import fetch
from ckpt.layout import MANIFEST
from ckpt.manifest import StepManifest
from ckpt.plan import Piece
from ckpt.storage import open_storage

pytestmark = pytest.mark.dist
FULL = os.environ.get("ARCHON_LAYOUTS") == "full"

ALONE = "1"
DENSE: dict[str, tuple[int, ParallelDims]] = {
    ALONE: (1, ParallelDims()),
    "fsdp 2": (2, ParallelDims()),
    "hsdp 2x1": (2, ParallelDims(dp_replicate=2)),
    "tp 2": (2, ParallelDims(tp=2)),
    "pp 2": (2, ParallelDims(pp=2)),
    "fsdp 4": (4, ParallelDims()),
    "hsdp 2x2": (4, ParallelDims(dp_replicate=2)),
    "tp 4": (4, ParallelDims(tp=4)),
    "fsdp 2 x tp 2": (4, ParallelDims(tp=2)),
    "fsdp 2 x sp 2": (4, ParallelDims(tp=2, sequence_parallel=True)),
    "hsdp 2x1 x tp 2": (4, ParallelDims(dp_replicate=2, tp=2)),
    "pp 4": (4, ParallelDims(pp=4)),
    "pp 2 x fsdp 2": (4, ParallelDims(pp=2)),
    "pp 2 x hsdp 2x1": (4, ParallelDims(pp=2, dp_replicate=2)),
    "pp 2 x tp 2": (4, ParallelDims(pp=2, tp=2)),
}
EXPERTS: dict[str, tuple[int, ParallelDims]] = {
    ALONE: (1, ParallelDims()),
    "fsdp 2": (2, ParallelDims()),
    "ep 2": (2, ParallelDims(ep=2)),
    "pp 2": (2, ParallelDims(pp=2)),
    "fsdp 4": (4, ParallelDims()),
    "ep 2 x fsdp 2": (4, ParallelDims(ep=2)),
    "hsdp 2x2 x ep 2": (4, ParallelDims(dp_replicate=2, ep=2)),
    "pp 2 x ep 2": (4, ParallelDims(pp=2, ep=2)),
}
LAYOUTS = {"dense": DENSE, "experts": EXPERTS}

SAMPLE: dict[tuple[str, str], tuple[str, ...]] = {
    ("dense", ALONE): ("pp 2 x tp 2",),
    ("dense", "pp 2"): ("hsdp 2x2",),
    ("dense", "pp 2 x fsdp 2"): (ALONE, "tp 2"),
    ("experts", ALONE): ("ep 2",),
    ("experts", "pp 2 x ep 2"): ("hsdp 2x2 x ep 2",),
}
EVERY = {
    (model, saver): tuple(name for name in layouts if name != saver)
    for model, layouts in LAYOUTS.items()
    for saver in layouts
}
CHOSEN = EVERY if FULL else SAMPLE
PAIRS = [(*key, loader) for key, loaders in CHOSEN.items() for loader in loaders]

LOSS = 2e-4
"""Relative difference of losses and gradient norms: fp32 sums in another order."""
WEIGHT = 1e-4
"""Absolute difference of adapters after three updates of 1e-2 each."""


def _name(model: str, saver: str, loader: str | None = None) -> str:
    return f"{model}, {saver}" if loader is None else f"{model}, {saver} to {loader}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def results(root: Path) -> dict[str, list[Any]]:
    """By job, then by rank."""
    paths = {
        "dense": tiny_model(root / "dense", layers=4, heads=4, kv_heads=4),
        "experts": str(write_moe(root / "experts")),
    }
    found: dict[str, list[Any]] = {}
    savers: dict[int, dict[str, Job]] = {1: {}, 2: {}, 4: {}}
    loaders: dict[int, dict[str, Job]] = {1: {}, 2: {}, 4: {}}
    for (model, saver), others in CHOSEN.items():
        name = _name(model, saver)
        world, dims = LAYOUTS[model][saver]
        savers[world][name] = Job(paths[model], dims, None, str(root / name))
        for loader in others:
            both = _name(model, saver, loader)
            world, dims = LAYOUTS[model][loader]
            loaders[world][both] = Job(paths[model], dims, str(root / name), str(root / both))
    deadline = 1800.0 if FULL else 200.0
    for jobs in (savers, loaders):
        found |= {name: [ranks_matrix.work(job)] for name, job in jobs[1].items()}
        two = run_ranks(2, ranks_matrix.works, jobs[2], timeout=deadline)
        if jobs is savers:
            four = run_ranks(4, ranks_matrix.works, jobs[4], timeout=deadline)
        else:
            arguments = (jobs[4], str(root / "growth"))
            both = run_ranks(4, ranks_matrix.on_four, *arguments, timeout=deadline)
            four = [rank[0] for rank in both]
            found["growth"] = [rank[1] for rank in both]
        for ranks, world in ((two, 2), (four, 4)):
            found |= {name: [rank[name] for rank in ranks] for name in jobs[world]}
    return found


def _alike(ours: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert b[key] == pytest.approx(a[key], rel=LOSS), key


def _step(root: Path) -> tuple[StepManifest, Path]:
    (path,) = root.glob(f"steps/*/{MANIFEST}")
    return StepManifest.from_bytes(path.read_bytes(), str(path)), path.parent


def _tensors(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a step, whole."""
    manifest, directory = _step(root)
    pieces = [
        Piece(t.name, t.dtype, t.shape, (0,) * len(t.shape), t.shape, True)
        for t in manifest.tensors
    ]
    place = f"steps/{directory.name}"
    return fetch(open_storage(str(root)), place, manifest, pieces, rank=0, world=1)


def _adapter(root: Path) -> Path:
    (path,) = root.glob("adapters/*/adapter_model.safetensors")
    return path


@pytest.mark.parametrize(("model", "saver"), [key for key in CHOSEN if key[1] != ALONE])
def test_training_is_that_of_one_rank(
    results: dict[str, list[Any]], root: Path, model: str, saver: str
) -> None:
    (one,) = results[_name(model, ALONE)]
    for rank in results[_name(model, saver)]:
        _alike(one["trained"], rank["trained"])
        _alike(one["next"], rank["next"])
    ours, theirs = (load_file(_adapter(root / _name(model, who))) for who in (ALONE, saver))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=WEIGHT)


@pytest.mark.parametrize(("model", "saver", "loader"), PAIRS)
def test_another_layout_takes_over(
    results: dict[str, list[Any]], root: Path, model: str, saver: str, loader: str
) -> None:
    """Nothing is computed between the restore and the second save, so not a bit may differ."""
    before, after = root / _name(model, saver), root / _name(model, saver, loader)
    ours, theirs = _tensors(before), _tensors(after)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optim.") for name in ours)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert _adapter(before).read_bytes() == _adapter(after).read_bytes()
    saved = results[_name(model, saver)][0]
    for rank in results[_name(model, saver, loader)]:
        assert (rank["start"], rank["version"]) == (TRAINED, TRAINED)
        assert len(rank["next"]) == MORE
        _alike(saved["next"], rank["next"])


@pytest.mark.parametrize("name", [_name(*k) for k in CHOSEN] + [_name(*p) for p in PAIRS])
def test_a_step_is_one_copy_in_a_file_for_each_rank_that_holds_something(
    results: dict[str, list[Any]], root: Path, name: str
) -> None:
    ranks = results[name]
    manifest, directory = _step(root / name)
    chunks = [chunk for tensor in manifest.tensors for chunk in tensor.chunks]
    whole = sum(math.prod(t.shape) for t in manifest.tensors) * 4
    assert sum(chunk.end - chunk.start for chunk in chunks) == whole
    shards = {file.name for file in manifest.files} - {"state.json"}
    assert {path.name for path in directory.iterdir()} == {*shards, "state.json", MANIFEST}
    writers = {rank for rank, found in enumerate(ranks) if found["staged"]}
    assert shards == {f"shard-{r:05}-of-{len(ranks):05}.safetensors" for r in writers}
    # The slot of a rank is its file: no rank stages more than it writes, or than it holds.
    for rank, found in enumerate(ranks):
        size = sum(c.end - c.start for c in chunks if f"shard-{rank:05}-" in c.file)
        assert (size == 0) == (found["staged"] == 0)
        assert size <= found["held"]
    # Requests go by files, whatever the number of tensors: one for a rank's own file, and on rank 0
    # a few for state, manifest, version and retention and two for every file of another rank.
    first, *others = (found["requests"] for found in ranks)
    assert others == [int(rank in writers) for rank in range(1, len(ranks))]
    assert first <= 14 + 2 * len(ranks)


@pytest.mark.parametrize("name", [_name(*p) for p in PAIRS if p[0] == "dense"])
def test_ranks_share_the_writing(results: dict[str, list[Any]], root: Path, name: str) -> None:
    """Also of what several ranks hold: replicas, and factors that are whole on every rank."""
    manifest, _ = _step(root / name)
    loads = dict.fromkeys(range(len(results[name])), 0)
    for tensor in manifest.tensors:
        for chunk in tensor.chunks:
            loads[int(chunk.file.split("-")[1])] += chunk.end - chunk.start
    assert max(loads.values()) < 1.2 * min(loads.values()), loads


def test_no_rank_holds_everything(results: dict[str, list[Any]]) -> None:
    """Two slots of a rank's quarter are the design, and of a version two of a quarter of that.

    The rank that makes a version reads the others' parts through a cache, which is bounded (see
    ``test_consolidate.py``) but here has room for the whole adapter.
    """
    for rank, found in enumerate(results["growth"]):
        assert found["save"] < 0.75 * found["whole state"], found
        assert found["restore"] < 0.4 * found["whole state"], found
        assert found["publish"] < (2.5 if rank == 0 else 0.75) * found["whole"], found
