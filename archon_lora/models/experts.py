"""Mixture of experts: a router, and feed-forward blocks stacked in three tensors.

Shape suffixes: N tokens of all rows, D hidden, F feed-forward, X experts, A experts per token, R
rows for experts: every token once for each of its experts, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from archon_lora.grouped import grouped_linear, local_stack

Exchange = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Computes experts that lie on several ranks: ``(experts, rows, counts of all experts)``."""


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

    Attributes:
        expert_projections: what HuggingFace calls a stack's projection in one expert, by stack.
    """

    expert_projections: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    )

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(experts, width, hidden))
        self.w2 = nn.Parameter(torch.empty(experts, hidden, width))
        self.w3 = nn.Parameter(torch.empty(experts, width, hidden))
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x_RD: Tensor, counts_X: Tensor) -> Tensor:
        """Each expert on its rows.

        Args:
            x_RD: rows sorted by expert, (R, D).
            counts_X: rows of each expert that this rank holds, int64.

        Returns:
            (R, D).
        """
        w1, w2, w3 = (local_stack(weight) for weight in (self.w1, self.w2, self.w3))
        inner = functional.silu(grouped_linear(x_RD, w1, counts_X))
        inner = inner * grouped_linear(x_RD, w3, counts_X)
        return grouped_linear(inner, w2, counts_X)


class MoE(nn.Module):
    """Router and experts in the place of a feed-forward block.

    Attributes:
        exchange: sends rows to the ranks that hold their experts and brings the results back; None
            where every rank holds all experts.
    """

    def __init__(
        self, hidden: int, width: int, *, experts: int, per_token: int, normalise: bool
    ) -> None:
        super().__init__()
        self.router = Router(hidden, experts, per_token, normalise=normalise)
        self.experts = GroupedExperts(experts, hidden, width)
        self.total = experts
        self.exchange: Exchange | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x_ND = x_BSD.reshape(-1, x_BSD.shape[-1])
        weights_NA, chosen_NA = self.router(x_ND)
        chosen_R = chosen_NA.flatten()
        # Stable, so that a token's place within an expert does not depend on the sort.
        order_R = chosen_R.argsort(stable=True)
        token_R = order_R // chosen_NA.shape[1]
        counts_X = torch.bincount(chosen_R, minlength=self.total)
        if self.exchange is None:
            y_RD = self.experts(x_ND[token_R], counts_X)
        else:
            y_RD = self.exchange(self.experts, x_ND[token_R], counts_X)
        y_RD = y_RD * weights_NA.flatten()[order_R, None]
        out_ND = torch.zeros_like(x_ND).index_add(0, token_R, y_RD.to(x_ND.dtype))
        return out_ND.view_as(x_BSD)
