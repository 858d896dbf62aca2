"""One update of the parameters, from gradients that are there."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LRScheduler

from archon_lora.errors import NonFiniteGradient

from .config import OptimizerConfig
from .grad_norm import clip_grad_norm

_log = logging.getLogger(__name__)


def clipped_update(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    options: OptimizerConfig,
    *,
    group: dist.ProcessGroup,
) -> float:
    """Measure and clip the gradients, update, advance the schedule, clear the gradients.

    Args:
        optimizer: its parameters' gradients are used; a rank may have none.
        scheduler: steps with every update that is made.
        options: norm, clipping, and what a norm that is not finite does.
        group: the ranks that train together.

    Returns:
        The norm before clipping, equal on every rank; not finite if the update was skipped.

    Raises:
        NonFiniteGradient: the norm is NaN or infinite and ``on_nonfinite`` is ``"raise"``.
            Parameters, moments and schedule are as before, and the gradients are cleared.
    """
    norm = clip_grad_norm(
        [param for each in optimizer.param_groups for param in each["params"]],
        options.grad_clip,
        norm_type=options.norm_type,
        group=group,
    )
    if math.isfinite(norm):
        optimizer.step()
        scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    if math.isfinite(norm):
        return norm
    if options.on_nonfinite == "raise":
        msg = (
            f"the gradient norm is {norm}; nothing was updated. Set "
            "optimizer.on_nonfinite='skip' to drop such updates and go on"
        )
        raise NonFiniteGradient(msg)
    _log.warning("update skipped: the gradient norm is %s", norm)
    return norm
