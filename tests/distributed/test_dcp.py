"""Plain DCP calls on two ranks over this package's storage, and stock DCP over its shards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support import ranks_dcp
from support.spawn import run_ranks
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ckpt.catalog import check_step, list_steps
from ckpt.dcp import Reader
from ckpt.dcp.importing import import_checkpoint
from ckpt.dtypes import TORCH_DTYPES
from ckpt.storage import open_storage

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def check_entries(entries: object) -> None:
    assert entries == ranks_dcp.ENTRIES
    assert isinstance(entries, dict)
    assert math.isinf(entries["betas"][1])


def test_save_async_save_and_load_with_other_placements(tmp_path: Path) -> None:
    url = str(tmp_path / "id")
    for wrong, entries in run_ranks(2, ranks_dcp.save_and_load, url, None):
        assert wrong == []
        check_entries(entries)
    storage = open_storage(url)
    (entry,) = list_steps(storage)
    assert entry.manifest is not None
    assert list(check_step(storage, entry)) == []
    shards = [f.name for f in entry.manifest.files if f.name.startswith("shard")]
    assert shards == [f"shard-0000{rank}-of-00002.safetensors" for rank in (0, 1)]

    live = {"model": ranks_dcp.zeros()}
    dcp.load(live, storage_reader=Reader(url))  # on one rank
    for name, value in ranks_dcp.whole().items():
        assert torch.equal(live["model"][name], value), name

    # Stock DCP's own checkpoint of the same shards, converted: the same tensors and entries.
    imported = import_checkpoint(f"{url}-stock", f"{url}-imported")
    live = {"model": ranks_dcp.zeros()}
    dcp.load(live, storage_reader=Reader(f"{url}-imported"))
    for name, value in ranks_dcp.whole().items():
        assert torch.equal(live["model"][name], value), name
    assert imported.entries == len(ranks_dcp.ENTRIES)


def test_faults(tmp_path: Path) -> None:
    (first, damaged), (second, damaged_too) = run_ranks(2, ranks_dcp.faults, str(tmp_path))
    # A rank that fails leaves no checkpoint; all ranks say which one and why, and can try again.
    assert first == second
    assert first[0] == "CkptError: rank 1: OSError: this rank's disk is on fire"
    assert first[1].startswith("NoCheckpoint: rank 0: no steps in")
    assert first[2] == "no error"
    assert first[3].startswith("StepExists: rank 0:")
    assert [p.name for p in (tmp_path / "id" / "steps").iterdir()] == ["step-00000000.w0001"]
    # Damage that one rank sees stops all of them before a live tensor changes.
    for error, untouched in (damaged, damaged_too):
        assert error.startswith("DamagedError: rank 1:")
        assert untouched


def test_a_trainers_steps(tmp_path: Path) -> None:
    """Stock DCP reads the shards of a step of two ranks; so does the reader of this package."""
    root = str(tmp_path)
    (values, error), (same, error_too) = run_ranks(2, ranks_dcp.trainer_steps, root)
    assert values == same
    assert values["model.a"] != [[0.0] * 6] * 3
    directory = tmp_path / "steps" / "step-00000001.w0001"
    assert len(list(directory.glob("*.safetensors"))) == 2
    entry = list_steps(open_storage(root))[-1]
    assert entry.manifest is not None
    for reader in (HuggingFaceStorageReader(str(directory)), Reader(root)):
        live = {
            record.name: torch.zeros(record.shape, dtype=TORCH_DTYPES[record.dtype])
            for record in entry.manifest.tensors
        }
        dcp.load(live, storage_reader=reader)
        assert {name: tensor.tolist() for name, tensor in live.items()} == values

    assert error == error_too
    assert "PlanError: rank 0: rank 0 reads step 0 of writer 1" in error
    assert "rank 1 step 1 of writer 1" in error


@pytest.mark.s3
def test_on_s3(s3) -> None:
    url = s3.url("id")
    for wrong, entries in run_ranks(2, ranks_dcp.save_and_load, url, s3.storage_options):
        assert wrong == []
        check_entries(entries)
    storage = open_storage(url, s3.storage_options)
    (entry,) = list_steps(storage)
    assert list(check_step(storage, entry)) == []
