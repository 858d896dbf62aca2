"""Forward and backward passes: through a model that this process has whole, or through stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .batch import Batch

WeightedLoss = Callable[[Tensor, int], Tensor]
"""(logits [B, S, V], number of the micro batch) to what is to be differentiated (0-d)."""


class Passes(Protocol):
    """How micro batches pass through the model."""

    def train(self, parts: Sequence[Batch], loss: WeightedLoss) -> None:
        """Add the gradients of all micro batches; ``loss`` is called where the logits are."""
        ...

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits ``[B, S, V]`` of a batch, None where another rank has them."""
        ...

    def share(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Give a value from where the logits are to the ranks that have none."""
        ...


def model_options(batch: Batch) -> dict[str, Tensor]:
    """What of a batch the model itself takes beside the tokens."""
    return {name: batch[name] for name in ("attention_mask", "positions") if name in batch}


class WholeModel:
    """Passes through a model of which this process has every layer.

    Args:
        model: the model, sharded or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def train(self, parts: Sequence[Batch], loss: WeightedLoss) -> None:
        """Add the gradients of all micro batches; the last one's backward reduces them."""
        for index, part in enumerate(parts):
            if isinstance(self._model, FSDPModule):
                self._model.set_requires_gradient_sync(index == len(parts) - 1)
            loss(self.logits(part), index).backward()  # type: ignore[no-untyped-call]  # torch's

    def logits(self, batch: Batch) -> Tensor:
        """Logits ``[B, S, V]``."""
        logits: Tensor = self._model(batch["input_ids"], **model_options(batch))
        return logits

    def share(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The value: every rank has it."""
        if value is None:
            msg = f"no value of shape {tuple(shape)} was computed"
            raise RuntimeError(msg)
        return value
