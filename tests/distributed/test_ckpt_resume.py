"""Exact resume and resharding, on real FSDP2 ranks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from support import ranks_ckpt
from support.spawn import run_ranks

from ckpt.manifest import StepManifest
from ckpt.storage import open_storage
from ckpt.timeline_store import read_timeline

pytestmark = pytest.mark.dist


def read_manifest(root: Path, step: int) -> StepManifest:
    (path,) = root.glob(f"steps/step-{step:08d}.w*/MANIFEST.json")
    return StepManifest.from_bytes(path.read_bytes(), str(path))


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    root, out = tmp_path / "root", tmp_path / "out"
    out.mkdir()
    whole = run_ranks(2, ranks_ckpt.uninterrupted, 6)
    run_ranks(2, ranks_ckpt.train_save_die, str(root), str(out), 3, killed=(0, 1))
    first = [ast.literal_eval((out / f"{rank}.txt").read_text()) for rank in range(2)]
    second = run_ranks(2, ranks_ckpt.resume, str(root), 3)
    assert [start for start, _ in second] == [2, 2]
    for rank in range(2):
        assert first[rank] + second[rank][1] == whole[rank]


def test_any_number_of_ranks_to_any_other(tmp_path):
    """1 → 2 → 4 → 1; 3 and 5 rows leave ranks with uneven and with empty shards."""
    root = str(tmp_path / "root")
    digest = None
    for step, (world, train) in enumerate([(1, 2), (2, 0), (4, 1), (1, 0), (4, 0), (2, 0)]):
        answers = run_ranks(world, ranks_ckpt.restore_and_save, root, train, step)
        for start, before, after in answers:
            assert start == (None if step == 0 else step - 1)
            if digest is not None:
                # Before the first optimizer step the live state has no Adam tensors; afterwards
                # every one of them must be there, equal to the last bit.
                assert before == digest
            if train == 0:
                assert after == before
        digest = answers[0][2]
    assert len(digest) == 2 * (1 + 3) + 1  # a, b; exp_avg, exp_avg_sq, step of each; the buffer


def test_shards_hold_every_element_once(tmp_path):
    run_ranks(4, ranks_ckpt.restore_and_save, str(tmp_path), 1, 0)
    manifest = read_manifest(tmp_path, 0)
    sizes = {record.name: record for record in manifest.tensors}
    a = sizes["model.a"]
    assert a.shape == (3, 6)
    assert sorted(chunk.offsets for chunk in a.chunks) == [(0, 0), (1, 0), (2, 0)]
    assert len(sizes["model.steps"].chunks) == 1  # a plain tensor, equal on all ranks
    assert manifest.world_size == 4
    assert manifest.mesh == {"meshes": [{"shape": [4], "dim_names": None}]}
    (segment,) = read_timeline(open_storage(tmp_path))
    (told,) = segment.saves
    assert (told.world, told.outcome) == (4, "done")
    assert set(told.slowest) == {"stall_ms", "wait_ms", "plan_ms", "copy_ms", "write_ms"}
    shards = [file.size for file in manifest.files if file.name.startswith("shard")]
    assert told.numbers["stage_bytes"] == sum(shards)


def test_replicas_are_written_once(tmp_path):
    digests = run_ranks(4, ranks_ckpt.hybrid, str(tmp_path))
    assert all(digest == digests[0] for digest in digests)
    manifest = read_manifest(tmp_path, 0)
    for record in manifest.tensors:
        want = 1 if record.shape == () else 2
        assert len(record.chunks) == want, record.name
    answers = run_ranks(1, ranks_ckpt.restore_and_save, str(tmp_path), 0, 1)
    assert answers[0][1] == digests[0]


def test_training_collectives_run_beside_saves(tmp_path):
    assert run_ranks(2, ranks_ckpt.train_beside_saves, str(tmp_path)) == [3, 3]


def test_a_forward_without_backward_before_a_save_or_restore(tmp_path):
    """FSDP2 leaves the root gathered and cast then; what is saved must be the fp32 shards."""
    for answer in run_ranks(2, ranks_ckpt.save_after_a_forward, str(tmp_path)):
        assert answer["same"]
        assert "optim.0.weight.exp_avg" in answer["names"]
        assert answer["replanned"] is False
    manifest = read_manifest(tmp_path, 1)
    weight = next(record for record in manifest.tensors if record.name == "model.0.weight")
    assert weight.dtype == "F32"
    assert len(weight.chunks) == 2
