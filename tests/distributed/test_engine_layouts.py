"""Any layout to any other: what one layout saved, every other loads, continues and exports.

Saved bits are the same wherever the arithmetic is, and what lies on disk does not grow with the
number of replicas.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ranks_layouts
from support.engines import tiny_model
from support.model_dirs import read_weights
from support.ranks_layouts import Job
from support.spawn import run_ranks

from archon_lora.config import LoRAConfig
from archon_lora.models.parallel_dims import ParallelDims
from archon_lora.rl.config import load_config
from archon_lora.rl.loop import run_training
from archon_lora.rl.metrics import read_metrics

FULL = os.environ.get("ARCHON_LAYOUTS") == "full"
DEADLINE = 3000.0 if FULL else 280.0
pytestmark = [pytest.mark.dist, pytest.mark.timeout(2 * DEADLINE)]

LAYOUTS = {
    "fsdp": ParallelDims(),
    "fsdp x sp": ParallelDims(tp=2, sequence_parallel=True),
    "hsdp": ParallelDims(dp_replicate=2),
    "tp": ParallelDims(tp=4),
    "hsdp x tp": ParallelDims(dp_replicate=2, tp=2),
}
SAMPLE = (
    # LoRA rank (0: the whole model trains), who saves, who loads.
    (1, "fsdp x sp", ("hsdp", "tp")),
    (3, "hsdp", ("fsdp x sp",)),
    (0, "fsdp x sp", ("fsdp",)),
)
ALL = tuple((r, s, tuple(o for o in LAYOUTS if o != s)) for r in range(5) for s in LAYOUTS)
CHOSEN = ALL if FULL else SAMPLE


def name_of(rank: int, saver: str, loader: str) -> str:
    return f"r={rank}, {saver} to {loader}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def ranks(root: Path) -> list[dict[str, Any]]:
    """Everything that four processes do, and then what one does with it."""
    model = tiny_model(root / "model", heads=4, kv_heads=4)
    narrow = tiny_model(root / "narrow", heads=4, kv_heads=2)
    todo: dict[str, Job] = {}

    def job(rank: int, saver: str, loader: str, dims: ParallelDims) -> Job:
        name = name_of(rank, saver, loader)
        load = None if loader == saver else str(root / name_of(rank, saver, saver) / "whole")
        lora = LoRAConfig(rank=rank, alpha=2.0 * rank) if rank else None
        return Job(model, dims, lora, load, str(root / name))

    for rank, saver, loaders in CHOSEN:
        for loader in (saver, *loaders):
            todo[name_of(rank, saver, loader)] = job(rank, saver, loader, LAYOUTS[loader])
    config = write_run(root, model)
    overrides = ["parallel.tp=2", "parallel.sequence_parallel=true", *run_paths(root, "four")]
    arguments = (narrow, todo, str(config), overrides)
    done = run_ranks(4, ranks_layouts.several, *arguments, timeout=DEADLINE)
    for rank, saver, _ in CHOSEN:
        alone = ranks_layouts.work(job(rank, saver, "alone", ParallelDims()))
        for result in done:
            result["jobs"][name_of(rank, saver, "alone")] = alone
    return done


def write_run(root: Path, model: str) -> Path:
    config = root / "run.toml"
    config.write_text(
        f'[run]\nsteps = 3\n[model]\npath = "{model}"\n[lora]\nrank = 2\n'
        # Where a gradient is all but zero, a smaller eps makes its last bit a whole step.
        "[optimizer]\neps = 1e-3\n"
        "[rollout]\nprompts_per_step = 4\ngroup_size = 2\nmax_new_tokens = 4\n"
        '[task]\nlength = 4\n[checkpoint]\nroot = ""\n'
    )
    return config


def run_paths(root: Path, name: str) -> list[str]:
    return [f"run.metrics={root / name}.jsonl", f"checkpoint.root={root / name}"]


def adapter_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.mark.parametrize(("rank", "saver", "loaders"), CHOSEN)
def test_every_layout_goes_on_from_the_same_bits(
    ranks: list[dict[str, Any]], root: Path, rank: int, saver: str, loaders: tuple[str, ...]
) -> None:
    saved = ranks[0]["jobs"][name_of(rank, saver, saver)]
    for loader in (*loaders, "alone"):
        for result in ranks:
            loaded = result["jobs"][name_of(rank, saver, loader)]
            assert loaded["version"] == 2
            for part in ("weights", "moments"):
                assert loaded[part].keys() == saved[part].keys()
                for name, value in saved[part].items():
                    assert torch.equal(loaded[part][name], value), (loader, part, name)
            for kind in ("logprobs", "reference") if rank else ("logprobs",):
                torch.testing.assert_close(loaded[kind], saved[kind], rtol=0, atol=5e-6)
            for ours, theirs in zip(saved["next"], loaded["next"], strict=True):
                for key in ("loss", "grad_norm", "lr"):
                    assert theirs[key] == pytest.approx(ours[key], rel=2e-4), (loader, key)
        # Nothing is computed between a load and these, so not a bit may differ.
        for folder in ("adapter", "whole") if rank else ("whole",):
            here = adapter_files(root / name_of(rank, saver, loader) / folder)
            assert here == adapter_files(root / name_of(rank, saver, saver) / folder), loader
            assert len(here) >= 2
        if rank:
            assert loaded["served"] == saved["served"]


def manifest_of(folder: Path) -> dict[str, Any]:
    (path,) = folder.glob("whole/train_state/save-*/steps/*/MANIFEST.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(("rank", "saver", "loaders"), CHOSEN)
def test_replicas_are_written_once(
    ranks: list[dict[str, Any]], root: Path, rank: int, saver: str, loaders: tuple[str, ...]
) -> None:
    alone = root / name_of(rank, saver, "alone")
    (single,) = (f["size"] for f in manifest_of(alone)["files"] if "safetensors" in f["name"])
    for loader in (saver, *loaders):
        manifest = manifest_of(root / name_of(rank, saver, loader))
        files = [f["size"] for f in manifest["files"] if f["name"].endswith("safetensors")]
        assert len(files) <= 4
        tensors = manifest["tensors"]
        held = sum(c["end"] - c["start"] for t in tensors for c in t["chunks"])
        wanted = manifest_of(alone)["tensors"]
        assert held == sum(c["end"] - c["start"] for t in wanted for c in t["chunks"])
        # Headers and alignment; a second copy of anything large would show.
        assert sum(files) < single + 4 * 40_000, (loader, files, single)


def test_each_rank_reads_only_its_part_of_the_base(ranks: list[dict[str, Any]], root: Path) -> None:
    weights = read_weights(root / "model")
    sizes = {name: tensor.nbytes for name, tensor in weights.items()}
    name = name_of(1, "fsdp x sp", "fsdp x sp")
    read = [result["jobs"][name]["read"] for result in ranks]
    # Norms are whole on the two ranks that share a layer; everything else is read once.
    twice = sum(size for name, size in sizes.items() if "norm" in name)
    assert sum(read) == sum(sizes.values()) + twice
    assert max(read) < 0.3 * sum(sizes.values())


def test_rows_go_by_layout_and_not_by_rank(ranks: list[dict[str, Any]]) -> None:
    name = name_of(1, "fsdp x sp", "fsdp x sp")
    assert [r["jobs"][name]["dp"] for r in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    name = name_of(1, "fsdp x sp", "hsdp")
    assert [r["jobs"][name]["dp"] for r in ranks] == [(i, 4) for i in range(4)]
    for result in ranks:
        assert "split a batch by engine.dp_rank" in result["misfits"]["rows"]


def test_layouts_that_do_not_fit(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        said = result["misfits"]
        assert said["world"].startswith("ParallelConfigError: 4 ranks cannot be laid out as pp=1")
        assert "ep=2, but the model has no experts" in said["ep"]


def test_a_warm_start_and_its_reference_lie_on_split_layers(ranks: list[dict[str, Any]]) -> None:
    rank, saver, _ = CHOSEN[FULL * len(LAYOUTS)]
    saved = ranks[0]["jobs"][name_of(rank, saver, saver)]
    for result in ranks:
        started = result["started"]
        for name, value in saved["weights"].items():
            assert torch.equal(started["weights"][name], value), name
        assert torch.equal(started["reference"], started["begun"])
        torch.testing.assert_close(started["begun"], saved["logprobs"], rtol=0, atol=5e-6)
        assert not torch.allclose(started["policy"], started["begun"], atol=1e-3)


def test_a_run_is_the_same_on_any_layout_and_goes_on_from_any(
    ranks: list[dict[str, Any]], root: Path
) -> None:
    alone = [*run_paths(root, "alone"), "run.steps=5"]
    run_training(load_config(root / "run.toml", alone))
    # The checkpoint of four ranks in two tensor-parallel pairs, on one.
    run_training(load_config(root / "run.toml", [*run_paths(root, "four"), "run.steps=5"]))
    wanted, found = (read_metrics(root / f"{name}.jsonl") for name in ("alone", "four"))
    assert found.keys() == wanted.keys() == set(range(5))
    assert [found[step]["world"] for step in found] == [4, 4, 4, 1, 1]
    for step, record in found.items():
        assert record["tokens"] == wanted[step]["tokens"]
        assert record["reward"] == wanted[step]["reward"]
        for key in ("loss", "kl", "grad_norm", "clip_fraction"):
            assert record[key] == pytest.approx(wanted[step][key], rel=1e-3, abs=2e-6), key
