"""A rank that dies, hangs, raises or disagrees: the others hear of it and nothing is harmed."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ranks_ckpt
from support.spawn import run_ranks
from support.tiny_run import Run

from ckpt import CheckpointManager

pytestmark = pytest.mark.dist

DEADLINE = 4.0


def restored_digest(root: Path, step: int) -> dict[str, str]:
    run = Run(seed=1)
    with CheckpointManager(root) as manager:
        assert manager.restore(run.state) == step
        assert manager.last_restore.damaged == ()
        return run.digest()


@pytest.mark.parametrize(
    ("victim", "fault"),
    [
        (1, "posix.put.mid_write=kill"),
        (1, "posix.put.after_rename=kill"),
        (1, "posix.put.before_write=hang"),
        (0, "posix.put.mid_write=kill"),
        (0, "commit.before_manifest=kill"),
        (0, "posix.rename_dir.before=kill"),
    ],
)
def test_a_rank_that_dies_or_hangs(tmp_path, victim, fault):
    answers = run_ranks(
        2,
        ranks_ckpt.fault_in_second_save,
        str(tmp_path),
        victim,
        fault,
        DEADLINE,
        killed=(victim,),
    )
    seen = answers[1 - victim]
    kind, message = seen["error"]
    assert kind in {"SaveAborted", "VoteTimeout"}
    assert seen["future"] == kind
    assert f"rank {victim}" in message
    assert seen["took"] < 2 * DEADLINE + 3
    assert restored_digest(tmp_path, 0) == seen["kept"]
    if victim == 1:
        assert not list(tmp_path.glob("steps/.tmp-*")), "the survivor removes the attempt"


def test_a_step_whose_writer_died_after_the_rename_exists(tmp_path):
    run_ranks(
        2,
        ranks_ckpt.fault_in_second_save,
        str(tmp_path),
        0,
        "commit.after_manifest=kill",
        DEADLINE,
        killed=(0,),
    )
    restored_digest(tmp_path, 1)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_raises(tmp_path, victim):
    answers = run_ranks(
        2,
        ranks_ckpt.fault_in_second_save,
        str(tmp_path),
        victim,
        "posix.put.mid_write=raise",
        DEADLINE,
    )
    for seen in answers:
        kind, message = seen["error"]
        assert kind == "SaveAborted"
        assert f"rank {victim}" in message
        assert "injected fault" in message
        assert seen["took"] < DEADLINE
    assert len(list(tmp_path.glob("steps/*"))) == 2
    restored_digest(tmp_path, 1)


DIFFERENCES = {
    "shape": "model.bias: shape is (3,) on rank 0 and (4,) on rank 1",
    "name": "more: rank 1 has it, rank 0 does not",
    "dtype": "dtype is F32 on rank 0 and F64 on rank 1",
    "first step": "step is 1 on rank 0 and 2 on rank 1",
    "later step": "step is 2 on rank 0 and 3 on rank 1",
    "extra": "extra differs between rank 0 and rank 1",
    "later layout": "more: rank 1 has it, rank 0 does not",
    "later layout of rank 0": "on some ranks only",
}


def test_ranks_that_disagree_all_hear_the_difference(tmp_path):
    ways = list(DIFFERENCES)
    for answers in run_ranks(2, ranks_ckpt.disagree_in_every_way, str(tmp_path), ways):
        for way, errors in answers.items():
            (kind, message) = next(error for error in errors if error is not None)
            assert kind == "PlanError", way
            assert DIFFERENCES[way] in message
    for way in ways:
        steps = list((tmp_path / way).glob("steps/step-*"))
        assert len(steps) == (1 if way.startswith("later") else 0), way


def test_damage_on_one_rank_moves_all_to_the_older_step(tmp_path):
    digests = run_ranks(2, ranks_ckpt.three_saves, str(tmp_path))[0]
    (shard,) = tmp_path.glob("steps/step-00000002.*/shard-00001-*")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    for start, reasons, digest in run_ranks(2, ranks_ckpt.damaged, str(tmp_path)):
        assert start == 1
        assert len(reasons) == 1
        assert "shard-00001-of-00002" in reasons[0]
        assert digest == digests[1]


def test_a_misfit_on_one_rank_touches_nothing_on_any(tmp_path):
    run_ranks(2, ranks_ckpt.three_saves, str(tmp_path))
    for error, untouched in run_ranks(2, ranks_ckpt.misfit, str(tmp_path)):
        assert error is not None
        assert error[0] == "StateError"
        assert "model.more" in error[1]
        assert untouched
