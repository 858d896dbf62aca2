"""A training run small enough to be repeated often, with everything a resume must carry."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ckpt import AdapterExport, TensorRule, TrainState


class Tiny(nn.Module):
    """A frozen linear map (6 → 5) with a rank-3 adapter: 3 and 5 rows shard unevenly."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.base = nn.Parameter(torch.randn(5, 6, generator=generator), requires_grad=False)
        self.a = nn.Parameter(torch.randn(3, 6, generator=generator))
        self.b = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        return x @ self.base.T + (x @ self.a.T) @ self.b.T


class Cursor:
    """A data position: which batch comes next."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank
        self.position = 0

    def next(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.rank + self.position)
        self.position += 1
        return torch.randn(4, 6, generator=generator)

    def state_dict(self) -> dict[str, int]:
        return {"rank": self.rank, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


EXPORT = AdapterExport(
    peft_config={
        "peft_type": "LORA",
        "r": 3,
        "lora_alpha": 3,
        "target_modules": ["lin"],
        "bias": "none",
    },
    rules=(
        TensorRule("a", "base_model.model.lin.lora_A.weight"),
        TensorRule("b", "base_model.model.lin.lora_B.weight", scale=2.0),
    ),
)


class Run:
    """Model, AdamW, schedule, data and noise of one rank.

    Args:
        rank: this rank.
        world: number of ranks; above 1 the model is sharded by FSDP2.
        mesh: the mesh to shard over, or None for one of ``world`` ranks.
        seed: seeds the generators that training draws from (not the initial values).
    """

    def __init__(
        self, rank: int = 0, world: int = 1, *, mesh: DeviceMesh | None = None, seed: int = 7
    ) -> None:
        self.model = Tiny()
        if world > 1:
            fully_shard(self.model, mesh=mesh or init_device_mesh("cpu", (world,)))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": trained[:1], "lr": 0.1}, {"params": trained[1:], "weight_decay": 0.2}],
            lr=0.05,
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.cursor = Cursor(rank)
        self.state = TrainState(
            self.model,
            self.optimizer,
            self.scheduler,
            self.cursor,
            {"policy_version": 0},
            per_rank={"note": Cursor(rank)},
            export=EXPORT,
        )
        torch.manual_seed(seed + rank)
        random.seed(seed + rank)
        np.random.seed(seed + rank)

    def step(self) -> float:
        """One training step; returns this rank's loss."""
        x = self.cursor.next()
        noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
        loss = F.mse_loss(self.model(x), torch.full((4, 5), noise))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.state.extra["policy_version"] += 1
        return loss.item()

    def train(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def digest(self) -> dict[str, str]:
        """SHA-256 of every full tensor of the state, by checkpoint name (a collective)."""
        with torch.no_grad():
            return {
                name: hashlib.sha256(whole(tensor).numpy().tobytes()).hexdigest()
                for name, tensor in self.state.live().tensors.items()
            }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full value on the CPU, gathered if it is sharded."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def same(values: Sequence[object]) -> bool:
    """Whether all values are equal."""
    return all(value == values[0] for value in values)
