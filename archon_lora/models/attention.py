"""Grouped-query self-attention of every family, and its RMSNorm.

Shape suffixes: B batch, S new tokens, T all tokens seen so far (cache included), D hidden,
H query heads, K key/value heads, E head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cache import KVCache
from .decoder_config import DecoderConfig
from .rope import rotate


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in fp32, cast back, then scaled by ``weight``.

    With ``offset`` the scale is ``1 + weight``, applied in fp32 before the cast.
    """

    def __init__(self, dim: int, eps: float, *, offset: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.zeros(dim) if offset else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:
            return (scaled * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * scaled.to(x.dtype)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class Attention(nn.Module):
    """Grouped-query self-attention; biases, head norms, scale and cap as the family has them."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        traits = config.traits()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        self.scale = traits.attention_scale
        self.softcap = traits.attention_softcap
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.wq = nn.Linear(config.hidden_size, width, bias=traits.qkv_bias)
        self.wk = nn.Linear(config.hidden_size, kv_width, bias=traits.qkv_bias)
        self.wv = nn.Linear(config.hidden_size, kv_width, bias=traits.qkv_bias)
        self.wo = nn.Linear(width, config.hidden_size, bias=traits.out_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if traits.qk_norm:
            offset, eps = traits.offset_norms, config.rms_norm_eps
            self.q_norm = RMSNorm(config.head_dim, eps, offset=offset)
            self.k_norm = RMSNorm(config.head_dim, eps, offset=offset)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask_B1ST: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """Attend; ``mask`` is True where a query may look, None for plain causal attention."""
        batch, seq, _ = x_BSD.shape

        def heads(x: Tensor, norm: RMSNorm | None = None) -> Tensor:
            # The head count follows from the width, so that head-parallel shards work too.
            x = x.view(batch, seq, -1, self.head_dim)
            return (x if norm is None else norm(x)).transpose(1, 2)

        q_BHSE = rotate(heads(self.wq(x_BSD), self.q_norm), cos, sin)
        k_BKTE = rotate(heads(self.wk(x_BSD), self.k_norm), cos, sin)
        v_BKTE = heads(self.wv(x_BSD))
        if cache is not None:
            k_BKTE, v_BKTE = cache.update(self.layer, k_BKTE, v_BKTE)
        out_BHSE = self._mix(q_BHSE, k_BKTE, v_BKTE, mask_B1ST)
        out: Tensor = self.wo(out_BHSE.transpose(1, 2).reshape(batch, seq, -1))
        return out

    def _mix(self, q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: Tensor | None) -> Tensor:
        """(B, H, S, E): values of the visible tokens, weighted."""
        if self.softcap is not None:
            return _capped_attention(
                q_BHSE, k_BKTE, v_BKTE, mask, scale=self.scale, cap=self.softcap
            )
        return functional.scaled_dot_product_attention(
            q_BHSE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.grouped,
        )


def _capped_attention(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    mask_B1ST: Tensor | None,
    *,
    scale: float | None,
    cap: float,
) -> Tensor:
    """Attention with scores bent to ``cap * tanh(score / cap)``, which no fused kernel computes.

    Softmax in fp32; memory grows with S x T.
    """
    batch, heads, seq, width = q_BHSE.shape
    kv_heads, total = k_BKTE.shape[1:3]
    q_BKGSE = q_BHSE.view(batch, kv_heads, heads // kv_heads, seq, width)
    scores = q_BKGSE @ k_BKTE[:, :, None].transpose(-2, -1)
    scores = scores * (width**-0.5 if scale is None else scale)
    scores = cap * torch.tanh(scores / cap)
    if mask_B1ST is None:
        visible = torch.ones(seq, total, dtype=torch.bool, device=scores.device).tril(total - seq)
    else:
        visible = mask_B1ST[:, :, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q_BHSE.dtype)
    return (weights @ v_BKTE[:, :, None]).reshape(batch, heads, seq, width)
