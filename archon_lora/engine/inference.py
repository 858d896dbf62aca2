"""Forward passes without gradients: the frozen reference, and log-probabilities."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from archon_lora.errors import LoRANotEnabled


def reference_mode(model: nn.Module, *, has_lora: bool) -> AbstractContextManager[None]:
    """Within the block the model is its frozen base.

    Raises:
        LoRANotEnabled: there is no frozen base without LoRA.
    """
    if not has_lora:
        msg = (
            "reference=True needs LoRA, whose frozen base is the reference: set use_lora=true "
            "(EngineConfig(lora=LoRAConfig(...))), or keep a second engine with optimizer=None"
        )
        raise LoRANotEnabled(msg)
    from archon_lora.adapter import adapters_disabled

    return adapters_disabled(model)


def next_token_logprobs(logits_BSV: Tensor, ids_BS: Tensor, temperature: float) -> Tensor:
    """Log-probability of each token given those before it, fp32 ``[B, S - 1]``."""
    scaled = torch.log_softmax(logits_BSV[:, :-1].float() / temperature, dim=-1)
    targets = ids_BS[:, 1:].to(scaled.device)
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
