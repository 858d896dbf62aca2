"""What the ranks do that make the roots for the reader in ``examples/``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from ckpt import CheckpointManager, Retention, TrainState
from support.tiny_run import EXPORT, Run, whole


def make_roots(rank: int, world: int, folder: str) -> dict[int, dict[str, torch.Tensor]]:
    """A root: steps 0 to 2, a resume from step 1, then steps 2 and 3; what each holds, whole.

    Writer 1's step 2 is abandoned by that. Every step is published as a version of "run".
    """
    held: dict[int, dict[str, torch.Tensor]] = {}
    for train, begin in ((3, None), (2, 1)):
        run = Run(rank, world)
        half = torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).bfloat16()
        if world > 1:  # in columns, so that the pieces are not one behind the other
            half = distribute_tensor(half, init_device_mesh("cpu", (world,)), [Shard(1)])
        run.model.register_buffer("low", half)
        run.state = TrainState(
            run.model, run.optimizer, run.scheduler, run.cursor, {"policy_version": 0},
            export=replace(EXPORT, others=("low",)),
        )  # fmt: skip
        root = Path(folder, str(world))
        with CheckpointManager(root, vote_timeout=30, retention=Retention(latest=10)) as manager:
            assert manager.restore(run.state, step=begin) == begin
            first = 0 if begin is None else begin + 1
            for step in range(first, first + train):
                run.step()
                manager.save(step, run.state, publish=True).wait(30)
                # A copy, since the live tensors go on changing.
                tensors = run.state.live().tensors
                held[step] = {name: whole(tensor).clone() for name, tensor in tensors.items()}
    return held
