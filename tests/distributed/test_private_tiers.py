"""Tiers private to each node, shown by giving two ranks different directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ranks_tiers
from support.ranks_tiers import wait_for
from support.spawn import run_ranks
from support.tiny_run import Run

from ckpt import CheckpointManager
from ckpt.catalog import list_steps
from ckpt.storage import open_storage
from ckpt.tier import Tier
from ckpt.versions import read_version

pytestmark = pytest.mark.dist


def test_a_step_is_local_only_if_every_node_has_its_part(tmp_path):
    remote = tmp_path / "remote"
    args = (str(remote), str(tmp_path))
    first, second = run_ranks(2, ranks_tiers.private_tiers, *args, timeout=200)
    assert "tier on some ranks" not in first
    assert "tier on some ranks" not in second
    # Each tier holds its own rank's shard and no other.
    for rank in range(2):
        shards = {path.name for path in tmp_path.glob(f"tier-{rank}/steps/step-*/shard-*")}
        assert shards <= {f"shard-0000{rank}-of-00002.safetensors"}
    for seen in (first, second):
        step, local, digest, reasons = seen["both"]
        assert (step, local, reasons) == (1, True, [])
        assert digest == seen["digest 1"]
        step, local, digest, reasons = seen["unmirrored"]
        assert (step, local, reasons) == (2, True, [])
        assert digest == seen["digest 2"]
        # One damaged part, or one lost tier, and the step is whole nowhere: the one before is.
        for key in ("damaged part", "lost tier"):
            step, local, digest, reasons = seen[key]
            assert step == 1, key
            assert digest == seen["digest 1"], key
            assert "step 2 (writer 2) is not whole in the local tier" in reasons[0], key
        assert seen["damaged part"][1] is True
        assert seen["lost tier"][1] is False
    # The uploaders put both parts up, and the version was made of both.
    steps = list_steps(open_storage(remote))
    assert [(e.step, e.state) for e in steps] == [(0, "committed"), (1, "committed")]
    alone, run = Run(seed=2), first["digest 1"]
    with CheckpointManager(remote) as manager:
        assert manager.restore(alone.state) == 1
        assert alone.digest() == run
    assert first["versions"][0] == first["versions"][1]
    for number in (1, 2):
        version = read_version(open_storage(remote), f"t-v{number:08d}")
        assert version.adapter_sha256 == first["versions"][0]
    assert not list(Path(remote).glob("adapters/.parts-*"))
    for rank in range(2):
        tier = Tier(tmp_path / f"tier-{rank}", str(remote))
        wait_for(lambda tier=tier: not tier.uploader_alive())
