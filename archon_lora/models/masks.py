"""Which keys a query may see, and which position a token has.

Shape suffixes: B batch, S new tokens, T all tokens seen so far (cache included).
"""

from __future__ import annotations

import torch
from torch import Tensor


def default_positions(tokens: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """(B or 1, S) positions that count real tokens only."""
    if attention_mask is None:
        return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    # Left padding gets -1 from the running count; any position does there, so clamp to a valid one.
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def visibility(
    tokens: Tensor, attention_mask: Tensor | None, past: int, window: int | None = None
) -> Tensor | None:
    """(B or 1, 1, S, T) True where query s may attend to key t; None for plain causal.

    Args:
        tokens: (B, S) new token ids; only their shape and device count.
        attention_mask: (B, T) with 1 or True at real tokens, or None without padding.
        past: tokens per row before the new ones.
        window: most keys that a query sees, itself included; None for all.
    """
    seq = tokens.shape[1]
    if window is not None and window >= past + seq:
        window = None
    if attention_mask is None and past == 0 and window is None:
        return None
    causal_ST = torch.ones(seq, past + seq, dtype=torch.bool, device=tokens.device).tril(past)
    if window is not None:
        causal_ST = causal_ST.triu(past - window + 1)
    if attention_mask is None:
        return causal_ST[None, None]
    # A padded query sees itself: what a row without any key gives depends on the attention kernel,
    # and where it is NaN it spreads through 0 * NaN into the gradients of real rows.
    own_ST = torch.eye(seq, past + seq, dtype=torch.bool, device=tokens.device).roll(past, -1)
    return ((causal_ST & attention_mask.bool()[:, None, :]) | own_ST)[:, None]
