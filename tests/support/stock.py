"""Checkpoints as stock DCP writes them, and what somebody may do to them."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict


def model_and_optimizer(
    seed: int = 0, *, steps: int = 2
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two linear maps and an AdamW with two groups, after some steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first, second = list(model.parameters())[:2], list(model.parameters())[2:]
    optimizer = torch.optim.AdamW(
        [{"params": first, "lr": 0.01}, {"params": second, "weight_decay": 0.3}], lr=0.02
    )
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def state_dict(model: nn.Module, optimizer: Any, *, flat: bool = False) -> dict[str, Any]:
    """Model and optimizer as DCP's helpers give them."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model_state, optimizer_state = get_state_dict(model, optimizer, options=options)
    return {"model": model_state, "optim": optimizer_state}


def save(sd: dict[str, Any], directory: Path) -> Path:
    """``dcp.save`` with DCP's own storage, on one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.save(sd, checkpoint_id=directory, no_dist=True)
    return directory


def change_metadata(directory: Path, change: Callable[[Metadata], object]) -> None:
    """Load the ``.metadata``, change the object, and write it again."""
    path = directory / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


class Touch:
    """Pickles as a call that makes a file: whoever unpickles it with trust has run it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
