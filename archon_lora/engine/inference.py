"""Forward passes without gradients: the reference, and log-probabilities."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from archon_lora.errors import LoRANotEnabled
from archon_lora.placement import reshard

from .batch import Batch

if TYPE_CHECKING:
    from .build import BuiltModel
    from .engine import ArchonEngine


def as_reference(engine: ArchonEngine) -> AbstractContextManager[None]:
    """Within the block the engine's model is its reference.

    Raises:
        LoRANotEnabled: there is none without LoRA.
        EngineNotReady: see :func:`archon_lora.engine.reference.reference_mode`.
    """
    if engine.lora_config is None:
        msg = (
            "reference=True needs LoRA, whose frozen base is the reference: set use_lora=true "
            "(EngineConfig(lora=LoRAConfig(...))), or keep a second engine with optimizer=None"
        )
        raise LoRANotEnabled(msg)
    from .reference import reference_mode

    return reference_mode(engine)


def eval_logits(built: BuiltModel, rows: Batch) -> Tensor | None:
    """Logits ``[B, S, V]`` in eval mode; None where another stage of a pipeline has them."""
    training = [model.training for model in built.parts]
    try:
        for model in built.parts:
            model.eval()
        return built.passes.logits(rows)
    finally:
        for model, was in zip(built.parts, training, strict=True):
            model.train(was)
            reshard(model)


def next_token_logprobs(logits_BSV: Tensor, ids_BS: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token given those before it, fp32 ``[B, S - 1]``."""
    scaled = torch.log_softmax(logits_BSV[:, :-1].float() / temperature, dim=-1)
    targets = ids_BS[:, 1:].to(scaled.device)
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
