"""Exports of adapters that real ranks saved as DTensors: the same bytes from any sharding."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ranks_export
from support.spawn import run_ranks
from support.steps import tiny_adapter

from ckpt.consolidate import consolidate, export_tensors
from ckpt.peft import CONFIG_NAME, WEIGHTS_NAME

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_sharding_gives_the_bytes_of_whole_tensors(tmp_path: Path, world: int) -> None:
    assert all(run_ranks(world, ranks_export.save_sharded, str(tmp_path)))
    tensors, export = tiny_adapter(ranks_export.MODULES, rank=5, scale=1.7, optimizer=False)
    full = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    export_tensors(full, export, tmp_path / "whole")
    for placement in ranks_export.PLACEMENTS:
        root = tmp_path / placement
        consolidate(root, 3, root / "out")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            assert (root / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        if placement != "replicated":
            assert len(list(root.glob("steps/*/shard-*"))) == world


def test_tensor_parallel_models_give_the_bytes_of_an_unsharded_run(tmp_path: Path) -> None:
    ranks_export.save_model(0, 1, str(tmp_path / "plain"), "plain")
    seen = run_ranks(4, ranks_export.save_models, str(tmp_path))[0]
    for kind in ("plain", *ranks_export.TP_KINDS):
        consolidate(tmp_path / kind, 3, tmp_path / kind / "out")
    for kind in ranks_export.TP_KINDS:
        assert "None" not in seen[kind]  # every factor was a DTensor
        assert len(seen[kind]) >= 2
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            want = (tmp_path / "plain" / "out" / name).read_bytes()
            assert (tmp_path / kind / "out" / name).read_bytes() == want, kind


def test_experts_on_several_ranks_give_the_bytes_of_whole_tensors(tmp_path: Path) -> None:
    held = run_ranks(4, ranks_export.save_experts, str(tmp_path))
    assert [rank[0] for rank in held] == [2, 2, 1, 0]  # one has none at all
    tensors, export = ranks_export.stacked_experts()
    export_tensors(tensors, export, tmp_path / "whole")
    for kind in ranks_export.EP_KINDS:
        consolidate(tmp_path / kind, 3, tmp_path / kind / "out")
        for name in (WEIGHTS_NAME, CONFIG_NAME):
            want = (tmp_path / "whole" / name).read_bytes()
            assert (tmp_path / kind / "out" / name).read_bytes() == want, kind
