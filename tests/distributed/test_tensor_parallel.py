"""Layouts over real processes: meshes, and tensor parallelism beside FSDP2 and HSDP."""

import pytest
from support import ranks_tp
from support.spawn import run_ranks

from archon_lora.models.parallel_dims import ParallelDims

pytestmark = pytest.mark.dist


def test_meshes_of_four_ranks():
    layouts = [
        ParallelDims(),
        ParallelDims(dp_replicate=2),
        ParallelDims(pp=2, tp=2),
        ParallelDims(ep=2),
        ParallelDims(dp_replicate=2, ep=2),
        ParallelDims(tp=2),
    ]
    ranks = run_ranks(4, ranks_tp.meshes, layouts, 2)
    fsdp, hsdp, pp_tp, ep, hsdp_ep, tp = ranks[3][:6]
    assert fsdp == {
        **{view: [0, 1, 2, 3] for view in ("fsdp", "dp", "expert_fsdp")},
        **dict.fromkeys(("tp", "pp", "ep")),
        "dims": ("dp_shard",),
        "dp_rank": 3,
    }
    assert hsdp["fsdp"] == [[0, 1], [2, 3]]
    assert (hsdp["dp"], hsdp["dp_rank"]) == ([0, 1, 2, 3], 3)
    assert pp_tp["dims"] == ("pp", "dp_shard", "tp")
    assert (pp_tp["pp"], pp_tp["fsdp"], pp_tp["tp"]) == ([1, 3], [3], [2, 3])
    assert (ep["ep"], ep["expert_fsdp"], ep["fsdp"]) == ([2, 3], [1, 3], [0, 1, 2, 3])
    assert (hsdp_ep["ep"], hsdp_ep["expert_fsdp"]) == ([2, 3], [[1], [3]])
    assert (tp["fsdp"], tp["tp"], tp["dp_rank"]) == ([1, 3], [2, 3], 1)
    assert [rank[5]["dp_rank"] for rank in ranks] == [0, 0, 1, 1]
    for rank in (0, 1):
        part = ranks[rank][6]
        assert (part["tp"], part["fsdp"]) == ([0, 1], [rank])
    assert all("4 ranks cannot be laid out" in rank[-1] for rank in ranks)
