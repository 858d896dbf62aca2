"""The optimizer, and its learning rate as a pure function of the number of updates done."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from .config import OptimizerConfig


def lr_factor(config: OptimizerConfig, update: int) -> float:
    """Factor on ``config.lr`` for one update.

    The warm-up rises linearly and reaches 1 at update ``warmup_steps``; its first update already
    moves (factor ``1 / (warmup_steps + 1)``). A decay then runs to ``min_lr_ratio`` at
    ``total_steps`` and stays there.

    Args:
        config: schedule, warm-up and floor.
        update: number of updates already applied, from 0.

    Returns:
        A factor in [0, 1].
    """
    if update < config.warmup_steps:
        return (update + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant" or config.total_steps is None:
        return 1.0
    length = config.total_steps - config.warmup_steps
    done = min(1.0, (update - config.warmup_steps) / length)
    left = 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left


def build_optimizer(params: list[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW over the parameters, in one group; a pipeline stage may have none."""
    return AdamW(
        [{"params": params}],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def build_scheduler(optimizer: Optimizer, config: OptimizerConfig) -> LambdaLR:
    """Scheduler that is stepped once per applied update."""
    # A closure, not a callable object: LambdaLR stores an object's attributes in its state, and
    # the settings belong to the configuration, not to a checkpoint.
    return LambdaLR(optimizer, lambda update: lr_factor(config, update))
