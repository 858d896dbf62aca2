"""What a training step says over the network does not grow with the number of adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import ranks_collectives
from support.spawn import run_ranks

from archon_lora import LoRAConfig
from archon_lora.models.tiny import write_tiny_qwen2

pytestmark = pytest.mark.dist

LAYERS = 3
ADAPTERS = {
    "two": LoRAConfig(rank=2, target_modules=r".*layers\.2\..*q_proj"),
    "some": LoRAConfig(rank=2, target_modules=["q_proj"]),
    "all": LoRAConfig(rank=2, target_modules="all-linear"),
    "of all sizes": LoRAConfig(
        rank=2, target_modules="all-linear", rank_pattern={"q_proj": 1, "up_proj": 4}
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen2(tmp_path_factory.mktemp("model"), layers=LAYERS)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_step_of_fsdp2_sends_by_blocks_whatever_is_adapted(model: Path, recomputed: bool) -> None:
    options = {"activation_checkpointing": recomputed}
    for found in run_ranks(2, ranks_collectives.of_a_step, str(model), ADAPTERS, options):
        parameters = {name: count for name, (count, _) in found.items()}
        assert parameters == {"two": 2, "some": 6, "all": 42, "of all sizes": 42}
        per_block = {
            "c10d._allgather_base_": 1 + 2 * LAYERS,  # root; each block forward and backward
            "c10d._reduce_scatter_base_": LAYERS,
            "c10d.allgather_": 1,  # the norm
        }
        for name in ("some", "all", "of all sizes"):
            assert found[name][1] == per_block, name
        # Blocks without an adapter have nothing to reduce.
        assert found["two"][1]["c10d._reduce_scatter_base_"] == 1
