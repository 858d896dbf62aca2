"""Collectives of one training step, counted where torch hands them to the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor.debug import CommDebugMode

from archon_lora import LoRAConfig, get_adapter_params
from archon_lora.engine import clip_grad_norm
from support.ranks_models import sharded_model


def of_a_step(
    rank: int, world: int, directory: str, adapters: dict[str, LoRAConfig], options: dict[str, Any]
) -> dict[str, tuple[int, dict[str, int]]]:
    """For every adapter: how many parameters it has, and what its second step sent."""
    del rank
    found = {}
    for name, adapter in adapters.items():
        model, _ = sharded_model(directory, (world,), lora=adapter, **options)
        parameters = list(get_adapter_params(model).values())
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for _ in range(2):  # the first one sets FSDP2 up
            with CommDebugMode() as counted:
                model(torch.arange(6).reshape(1, 6)).float().square().mean().backward()
                clip_grad_norm(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad()
        counts = {str(op): count for op, count in counted.get_comm_counts().items()}
        found[name] = len(parameters), counts
    return found
