"""LoRA in AReaL's own Archon engine.

On a checkout of AReaL, whose environment this project is installed into (``pip install -e .``)::

    torchrun --nproc-per-node 2 examples/areal_lora.py --model Qwen/Qwen3-0.6B --out runs/areal

The lines that end in ``# ckpt`` are all that it takes; the rest is how AReaL's engine is used
without its trainer: a few updates on random tokens, a save as for a recovery, and a load. In
AReaL's trainer, the class takes the place of ``ArchonPPOActor``: see docs/howto/areal.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from areal.api import FinetuneSpec, ParallelStrategy, SaveLoadMeta
from areal.api.cli_args import OptimizerConfig, TrainEngineConfig
from areal.experimental.engine.archon_engine import ArchonPPOActor

from archon_lora.engine.areal import ArchonLoRA  # ckpt


class LoRAActor(ArchonLoRA, ArchonPPOActor):  # ckpt
    """AReaL's actor; ``use_lora`` and the fields beside it turn LoRA on."""


def negative_logprob(logprobs: torch.Tensor, _entropy: Any, _batch: Any, **_: Any) -> torch.Tensor:
    """A loss of the form that AReaL's engine asks for."""
    return -logprobs.mean()


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Train, save and load; AReaL's statistics of each update."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", default="runs/areal")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args(arguments)
    config = TrainEngineConfig(
        experiment_name="lora",
        trial_name="one",
        path=options.model,
        dtype=options.dtype,
        optimizer=OptimizerConfig(lr=1e-3),
        weight_update_mode="disk",
        use_lora=True,
        lora_rank=8,
        lora_alpha=16,
        target_modules=["all-linear"],
    )
    engine = LoRAActor(config)  # ckpt
    engine.create_process_group(ParallelStrategy(data_parallel_size=options.ranks))
    spec = FinetuneSpec(total_train_epochs=1, dataset_size=64, train_batch_size=4)
    engine.initialize(None, spec)
    recover = SaveLoadMeta(path=f"{options.out}/recover", weight_format="dcp", with_optim=True)
    if Path(recover.path).exists():
        engine.load(recover)
    stats = []
    for step in range(engine.get_version(), engine.get_version() + options.steps):
        seed = 100 * step + engine.rank
        ids = torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}
        stats.append(
            engine.train_batch(
                batch, negative_logprob, lambda part: part["attention_mask"].sum().float()
            )
        )
        engine.set_version(step + 1)
    engine.save(recover)
    engine.save(SaveLoadMeta(path=f"{options.out}/adapter", weight_format="hf", with_optim=False))
    engine.destroy()
    return stats


if __name__ == "__main__":
    print(main())
