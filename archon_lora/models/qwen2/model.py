"""The Qwen2 decoder under Archon's names.

Shape suffixes: B batch, S new tokens, T all tokens seen so far (cache included), D hidden,
F feed-forward, V vocabulary, H query heads, K key/value heads, E head width.

The numbers follow Qwen2: pre-norm blocks, RMSNorm in fp32, rotary embedding on the two halves of
each head, grouped-query attention with biases on q, k and v, and a gated silu feed-forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from archon_lora.models.cache import KVCache

from .config import Qwen2Config

if TYPE_CHECKING:
    from typing import Self


class RMSNorm(nn.Module):
    """Root-mean-square norm: computed in fp32, cast back, then scaled by ``weight``."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; shape and dtype stay."""
        x32 = x.float()
        scaled = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)

    def extra_repr(self) -> str:
        """Width and epsilon."""
        return f"{self.weight.shape[0]}, eps={self.eps}"


class RotaryEmbedding(nn.Module):
    """Rotary angles for given positions.

    ``inv_freq`` follows from the configuration, so it is not stored in checkpoints. It is made
    anew whenever the module is moved, cast or materialised: ``to_empty()`` would leave garbage
    in it, and a cast to bf16 would bend the angles of long sequences.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        """``theta ** (-2i / head_dim)`` for each rotary pair i, fp32, shape (head_dim / 2,)."""
        pair = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / self.theta ** (pair / self.head_dim)

    def init_buffers(self) -> None:
        """Compute ``inv_freq`` on the device it is on."""
        self.inv_freq = self._frequencies(self.inv_freq.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch does not type it
        self.init_buffers()
        return self

    def forward(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine of every angle, each (B, 1, S, E), computed in fp32."""
        angles = positions_BS[:, None, :, None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_BHSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (e, e + E/2) of each head by their angle."""
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query self-attention; biases on q, k, v and none on the output."""

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads != config.num_attention_heads
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.wq = nn.Linear(config.hidden_size, width, bias=True)
        self.wk = nn.Linear(config.hidden_size, kv_width, bias=True)
        self.wv = nn.Linear(config.hidden_size, kv_width, bias=True)
        self.wo = nn.Linear(width, config.hidden_size, bias=False)

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

        def heads(x: Tensor) -> Tensor:
            # The head count follows from the width, so that head-parallel shards work too.
            return x.view(batch, seq, -1, self.head_dim).transpose(1, 2)

        q_BHSE = rotate(heads(self.wq(x_BSD)), cos, sin)
        k_BKTE = rotate(heads(self.wk(x_BSD)), cos, sin)
        v_BKTE = heads(self.wv(x_BSD))
        if cache is not None:
            k_BKTE, v_BKTE = cache.update(self.layer, k_BKTE, v_BKTE)
        out_BHSE = functional.scaled_dot_product_attention(
            q_BHSE,
            k_BKTE,
            v_BKTE,
            attn_mask=mask_B1ST,
            is_causal=mask_B1ST is None,
            enable_gqa=self.grouped,
        )
        out: Tensor = self.wo(out_BHSE.transpose(1, 2).reshape(batch, seq, -1))
        return out


class FeedForward(nn.Module):
    """Gated feed-forward: ``w2(silu(w1 x) * w3 x)`` (gate, down and up in HuggingFace's words)."""

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        out: Tensor = self.w2(functional.silu(self.w1(x_BSD)) * self.w3(x_BSD))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residual connections.

    Attributes:
        recompute: compute the activations again in backward instead of keeping them. Done inside
            the block, so that no wrapper module changes a parameter's name.
    """

    def __init__(self, config: Qwen2Config, layer: int) -> None:
        super().__init__()
        self.recompute = False
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask_B1ST: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        if self.recompute and torch.is_grad_enabled():
            out: Tensor = checkpoint(
                self._block, x_BSD, cos, sin, mask_B1ST, cache, use_reentrant=False
            )
            return out
        return self._block(x_BSD, cos, sin, mask_B1ST, cache)

    def _block(
        self,
        x_BSD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask_B1ST: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        h_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin, mask_B1ST, cache)
        out: Tensor = h_BSD + self.feed_forward(self.ffn_norm(h_BSD))
        return out


class Qwen2Model(nn.Module):
    """Qwen2 for causal language modelling.

    A tied model has no ``output`` module: its head *is* ``tok_embeddings.weight``. One parameter
    under one name keeps sharding, saving and ``to_empty()`` free of aliases.
    """

    def __init__(self, config: Qwen2Config) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): TransformerBlock(config, i) for i in range(config.num_hidden_layers)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.output: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config.head_dim, config.rope_theta)

    def init_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds, on the device they are on.

        ``to_empty()`` and ``to()`` do this by themselves; call it after writing into the buffers
        by hand.
        """
        self.rope.init_buffers()

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits of the next token at every position.

        Args:
            tokens: (B, S) token ids, int64.
            positions: (B, S) or (1, S) positions for the rotary embedding. By default the
                index of a token among the real (unpadded) tokens of its row.
            attention_mask: (B, T) with 1 or True at real tokens and 0 at padding, on either side;
                T counts the cached tokens and the new ones. None when there is no padding.
            cache: keys and values of the tokens before; extended by the new ones. For
                generation only, hence without gradients.

        Returns:
            (B, S, V) logits in the model's compute dtype; those at padding are meaningless.

        Raises:
            ValueError: a shape does not fit, or a cache is used while gradients are recorded.
        """
        past = 0 if cache is None else cache.length
        if cache is not None and torch.is_grad_enabled():
            msg = "a KVCache is for generation: call the model under torch.no_grad()"
            raise ValueError(msg)
        seq = tokens.shape[1]
        if attention_mask is not None and attention_mask.shape != (tokens.shape[0], past + seq):
            msg = (
                f"attention_mask must be (batch, cached + new) = {(tokens.shape[0], past + seq)}, "
                f"got {tuple(attention_mask.shape)}"
            )
            raise ValueError(msg)
        if positions is None:
            positions = _default_positions(tokens, attention_mask, past)
        mask_B1ST = _visibility(tokens, attention_mask, past)

        h_BSD: Tensor = self.tok_embeddings(tokens)
        cos, sin = self.rope(positions, h_BSD.dtype)
        for block in self.layers.values():
            h_BSD = block(h_BSD, cos, sin, mask_B1ST, cache)
        h_BSD = self.norm(h_BSD)
        if cache is not None:
            cache.advance(seq)
        if self.output is None:
            return functional.linear(h_BSD, self.tok_embeddings.weight)
        logits: Tensor = self.output(h_BSD)
        return logits


def _default_positions(tokens: Tensor, attention_mask: Tensor | None, past: int) -> Tensor:
    """(B or 1, S) positions that count real tokens only."""
    if attention_mask is None:
        return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    # Left padding gets -1 from the running count; any position does there, so clamp to a valid one.
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]


def _visibility(tokens: Tensor, attention_mask: Tensor | None, past: int) -> Tensor | None:
    """(B or 1, 1, S, T) True where query s may attend to key t; None for plain causal."""
    seq = tokens.shape[1]
    if attention_mask is None and past == 0:
        return None
    causal_ST = torch.ones(seq, past + seq, dtype=torch.bool, device=tokens.device).tril(past)
    if attention_mask is None:
        return causal_ST[None, None]
    # A padded query sees itself: what a row without any key gives depends on the attention kernel,
    # and where it is NaN it spreads through 0 * NaN into the gradients of real rows.
    own_ST = torch.eye(seq, past + seq, dtype=torch.bool, device=tokens.device).roll(past, -1)
    return ((causal_ST & attention_mask.bool()[:, None, :]) | own_ST)[:, None]
