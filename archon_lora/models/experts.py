"""Mixture of experts: a router, and feed-forward blocks stacked in three tensors.

Shape suffixes: N tokens of all rows, D hidden, F feed-forward, X experts, A experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class Router(nn.Module):
    """Scores every expert for every token and keeps the best few."""

    def __init__(self, hidden: int, experts: int, per_token: int, *, normalise: bool) -> None:
        super().__init__()
        self.per_token = per_token
        self.normalise = normalise
        self.gate = nn.Linear(hidden, experts, bias=False)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Weights, in the input's dtype, and indices of the chosen experts, each (N, A).

        Probabilities are over all experts, in fp32; ``normalise`` makes those kept sum to 1.
        """
        logits_NX = self.gate(x_ND)
        probabilities = torch.softmax(logits_NX, dim=-1, dtype=torch.float32)
        weights, chosen = torch.topk(probabilities, self.per_token, dim=-1)
        if self.normalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits_NX.dtype), chosen


class GroupedExperts(nn.Module):
    """Gated feed-forward blocks of all experts; ``w1`` gate, ``w2`` down, ``w3`` up.

    Experts are computed one after another: right everywhere, fast nowhere.

    Attributes:
        hf_projections: what HuggingFace calls the projections of one expert.
    """

    hf_projections: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)

    def untargetable(self, hf_name: str) -> dict[str, str]:
        """Why an expert's projections take no adapter, by HF name, for ``apply_lora``."""
        reason = (
            "experts lie stacked in one tensor, which takes no adapter here; name q_proj, k_proj, "
            'v_proj and o_proj, or give "all-linear", which leaves experts out'
        )
        return {
            f"{hf_name}.{expert}.{projection}": reason
            for expert in range(self.w1.shape[0])
            for projection in self.hf_projections
        }

    def forward(self, x_ND: Tensor, weights_NA: Tensor, chosen_NA: Tensor) -> Tensor:
        """Weighted sum of the chosen experts' outputs, (N, D)."""
        out_ND = torch.zeros_like(x_ND)
        for expert in range(self.w1.shape[0]):
            token, slot = torch.where(chosen_NA == expert)
            x = x_ND[token]
            inner = functional.silu(functional.linear(x, self.w1[expert]))
            inner = inner * functional.linear(x, self.w3[expert])
            y = functional.linear(inner, self.w2[expert]) * weights_NA[token, slot, None]
            out_ND = out_ND.index_add(0, token, y.to(out_ND.dtype))
        return out_ND


class MoE(nn.Module):
    """Router and experts in the place of a feed-forward block."""

    def __init__(
        self, hidden: int, width: int, *, experts: int, per_token: int, normalise: bool
    ) -> None:
        super().__init__()
        self.router = Router(hidden, experts, per_token, normalise=normalise)
        self.experts = GroupedExperts(experts, hidden, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_NA, chosen_NA = self.router(x_ND)
        out: Tensor = self.experts(x_ND, weights_NA, chosen_NA).view_as(x_BSD)
        return out
