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


def test_each_rank_reads_its_own_part(tmp_path):
    root = str(tmp_path)
    run_ranks(1, ranks_reshard.save_large, root)
    total = sum(path.stat().st_size for path in tmp_path.rglob("shard-*"))
    read = run_ranks(2, ranks_reshard.read_large, root)
    block = 8 * 1024 * 1024
    for received in read:
        assert total / 2 <= received <= total / 2 + 2 * block
