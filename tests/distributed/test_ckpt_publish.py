"""Published versions of sharded adapters."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from support import ranks_ckpt
from support.spawn import run_ranks
from support.tiny_run import Run, whole

from ckpt import CheckpointManager
from ckpt.storage import open_storage
from ckpt.versions import read_version

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("world", [2, 4])
def test_versions_hold_the_values_whatever_the_sharding(tmp_path, world):
    answers = run_ranks(world, ranks_ckpt.publish_both_ways, str(tmp_path))
    assert all(answer == answers[0] for answer in answers)
    names = [entry.split()[0] for entry in answers[0]]
    assert names == ["t-v00000001", "t-v00000002", "t-v00000003"]
    assert len({entry.split()[1] for entry in answers[0]}) == 1, "one snapshot, equal bytes"
    storage = open_storage(tmp_path)
    for name in names:
        read_version(storage, name)
    assert not list(tmp_path.glob("adapters/.parts-*"))

    run = Run(seed=1)
    with CheckpointManager(tmp_path) as manager:
        manager.restore(run.state)
    tensors = load_file(tmp_path / "adapters" / names[2] / "adapter_model.safetensors")
    a, b = tensors.values() if "lora_A" in next(iter(tensors)) else reversed(tensors.values())
    assert a.equal(whole(run.model.a))
    assert b.equal(2 * whole(run.model.b))


def test_a_failed_publish_costs_no_step(tmp_path):
    for committed, error, next_step in run_ranks(2, ranks_ckpt.publish_nan, str(tmp_path)):
        assert committed == 0
        assert error[0] == "PublishError"
        assert "lora_A" in error[1]
        assert next_step == 1
    assert len(list(tmp_path.glob("steps/step-*"))) == 2
    assert not list(tmp_path.glob("adapters/*/MANIFEST.json"))
