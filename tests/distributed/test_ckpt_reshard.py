"""Any placement to any other, to the last bit, optimizer included; and how much each rank reads."""

from __future__ import annotations

import pytest
from support import ranks_reshard
from support.spawn import run_ranks

pytestmark = pytest.mark.dist


def test_fsdp_tp_and_both_restore_each_other(tmp_path):
    root = str(tmp_path)
    plan = [
        (1, ["plain"]),
        (2, ["fsdp", "tp", "fsdp"]),
        (4, ["tp", "both", "fsdp", "both"]),
        (2, ["tp"]),
        (1, ["plain"]),
    ]
    first, want = 0, None
    for world, kinds in plan:
        answers = run_ranks(world, ranks_reshard.reshard, root, kinds, first)
        for answer in answers:
            for number, (kind, start, digest) in enumerate(answer):
                want = want or digest
                assert start == (first + number - 1 if first + number else None), (world, kind)
                assert digest == want, (world, kind)
        first += len(kinds)
    assert len(want) == 4 * (1 + 3)  # two weights and biases; exp_avg, exp_avg_sq, step of each
    wanted = {"both": ["optimizer"], "tp": ["model"]}
    for answers in run_ranks(4, ranks_reshard.reshard_parts, root, wanted):
        for kind, (start, restored, before, after) in answers.items():
            assert (start, restored) == (first - 1, wanted[kind])
            prefix = "optim." if kind == "both" else "model."
            assert after.keys() == want.keys()
            for name, value in after.items():
                assert value == (want if name.startswith(prefix) else before)[name], (kind, name)
            assert any(before[name] != want[name] for name in after if name.startswith(prefix))


DIFFERENCES = {
    "step": "step is 1 on rank 0 and 0 on rank 1",
    "strict": "strict is True on rank 0 and False on rank 1",
    "parts": "parts is ['model', 'optimizer'] on rank 0 and ['model'] on rank 1",
    "name": "no part of a checkpoint is called 'modell'",
    "name of rank 0": "no part of a checkpoint is called 'modell'",
}


def test_ranks_that_ask_for_different_things_all_hear_it(tmp_path):
    for answers in run_ranks(2, ranks_reshard.disagree, str(tmp_path), list(DIFFERENCES)):
        for way, message in DIFFERENCES.items():
            kind, text = answers[way]
            assert kind == ("ConfigError" if way.startswith("name") else "PlanError"), way
            assert message in text, way


def test_each_rank_reads_its_own_part(tmp_path):
    root = str(tmp_path)
    run_ranks(1, ranks_reshard.save_large, root)
    total = sum(path.stat().st_size for path in tmp_path.rglob("shard-*"))
    read = run_ranks(2, ranks_reshard.read_large, root)
    block = 8 * 1024 * 1024
    for received in read:
        assert total / 2 <= received <= total / 2 + 2 * block
