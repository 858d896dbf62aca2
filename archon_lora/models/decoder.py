"""The decoder of every family under Archon's names; what differs is in ``DecoderConfig.traits``.

Shape suffixes: B batch, S new tokens, T all tokens seen so far (cache included), D hidden,
F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .attention import Attention, RMSNorm
from .cache import KVCache
from .decoder_config import DecoderConfig
from .masks import default_positions, visibility
from .rope import RotaryEmbedding


class FeedForward(nn.Module):
    """Gated feed-forward: ``w2(act(w1 x) * w3 x)`` (gate, down and up in HuggingFace's words)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        traits = config.traits()
        hidden, width, bias = config.hidden_size, config.intermediate_size, traits.mlp_bias
        self.activation = traits.activation
        self.w1 = nn.Linear(hidden, width, bias=bias)
        self.w2 = nn.Linear(width, hidden, bias=bias)
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        gate = self.w1(x_BSD)
        if self.activation == "silu":
            gate = functional.silu(gate)
        else:
            gate = functional.gelu(gate, approximate="tanh")
        out: Tensor = self.w2(gate * self.w3(x_BSD))
        return out


class TransformerBlock(nn.Module):
    """Pre-norm attention and feed-forward with residual connections.

    Attributes:
        recompute: compute the activations again in backward instead of keeping them. Done inside
            the block, so that no wrapper module changes a parameter's name.
    """

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        traits = config.traits()
        self.recompute = False
        self.attention = Attention(config, layer)
        self.add_feed_forward(config, layer)
        self.attention_norm = _norm(config)
        self.ffn_norm = _norm(config)
        self.attention_post_norm = _norm(config) if traits.sandwich_norms else None
        self.ffn_post_norm = _norm(config) if traits.sandwich_norms else None

    def add_feed_forward(self, config: DecoderConfig, layer: int) -> None:
        """Make the submodules of the second half; families with experts have others."""
        self.feed_forward = FeedForward(config)

    def feed(self, x_BSD: Tensor) -> Tensor:
        """The second half without norms and residual, (B, S, D) to (B, S, D)."""
        out: Tensor = self.feed_forward(x_BSD)
        return out

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
        mixed_BSD = self.attention(self.attention_norm(x_BSD), cos, sin, mask_B1ST, cache)
        if self.attention_post_norm is not None:
            mixed_BSD = self.attention_post_norm(mixed_BSD)
        h_BSD: Tensor = x_BSD + mixed_BSD
        fed_BSD = self.feed(self.ffn_norm(h_BSD))
        if self.ffn_post_norm is not None:
            fed_BSD = self.ffn_post_norm(fed_BSD)
        return h_BSD + fed_BSD


class TokenEmbedding(nn.Embedding):
    """The token embedding, which knows whether its weight is the output head's too."""

    def __init__(self, rows: int, width: int, *, tied: bool) -> None:
        super().__init__(rows, width)
        self.tied = tied

    def untargetable(self, hf_name: str) -> dict[str, str]:
        """What no adapter may be put beside; see :class:`archon_lora.candidates.Untargetable`."""
        if not self.tied:
            return {}
        return {
            hf_name: "its weight is the output head's too (tie_word_embeddings): an adapter "
            "would exist on one side only, and engines treat it in different ways"
        }


class Decoder(nn.Module):
    """A decoder for causal language modelling.

    A tied model has no ``output`` module: its head *is* ``tok_embeddings.weight``. One parameter
    under one name keeps sharding, saving and ``to_empty()`` free of aliases.

    Attributes:
        block_cls: the family's block.
        tied_head: what maps normed hidden states and the embedding's weight to logits in a tied
            model; tensor parallelism puts its own in.
        sequence_multiple: sequences are padded on the right, inside, to a multiple of this:
            above 1 where activations are sharded by position.
        embeds: whether it begins with tokens; a later pipeline stage begins with hidden states.
        predicts: whether it ends with logits; an earlier stage ends with hidden states.
    """

    block_cls: ClassVar[type[TransformerBlock]] = TransformerBlock

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        traits = config.traits()
        self.config = config
        self.tied_head: Callable[[Tensor, Tensor], Tensor] = functional.linear
        self.sequence_multiple = 1
        self.embeds = self.predicts = True
        self.embedding_scale = config.hidden_size**0.5 if traits.scale_embedding else None
        self.logit_softcap = traits.logit_softcap
        self.windows = [traits.window(i) for i in range(config.num_hidden_layers)]
        self.tok_embeddings = TokenEmbedding(
            config.vocab_size, config.hidden_size, tied=config.tie_word_embeddings
        )
        self.layers = nn.ModuleDict(
            {str(i): self.block_cls(config, i) for i in range(config.num_hidden_layers)}
        )
        self.norm = _norm(config)
        self.output: nn.Linear | None = None
        if not config.tie_word_embeddings:
            self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = RotaryEmbedding(config.head_dim, config.rope_theta, config.rope_scaling)
        self.local_rope: RotaryEmbedding | None = None
        if traits.local_rope_theta is not None:
            self.local_rope = RotaryEmbedding(config.head_dim, traits.local_rope_theta)

    def init_buffers(self) -> None:
        """Compute the buffers that no checkpoint holds, on the device they are on.

        ``to_empty()`` and ``to()`` do this by themselves; call it after writing into the buffers
        by hand.
        """
        self.rope.init_buffers()
        if self.local_rope is not None:
            self.local_rope.init_buffers()

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
            tokens: (B, S) token ids, int64; of a later pipeline stage what the one before
                returned, (B, S, D).
            positions: (B, S) or (1, S) positions for the rotary embedding. By default the
                index of a token among the real (unpadded) tokens of its row.
            attention_mask: (B, T) with 1 or True at real tokens and 0 at padding, on either side;
                T counts the cached tokens and the new ones. None when there is no padding.
            cache: keys and values of the tokens before; extended by the new ones. For
                generation only, hence without gradients.

        Returns:
            (B, S, V) logits in the model's compute dtype; those at padding are meaningless. Of a
            pipeline stage that is not the last, (B, S, D) hidden states.

        Raises:
            ValueError: a shape does not fit, or a cache is used while gradients are recorded.
        """
        past = 0 if cache is None else cache.length
        if cache is not None and torch.is_grad_enabled():
            msg = "a KVCache is for generation: call the model under torch.no_grad()"
            raise ValueError(msg)
        if cache is not None and self.sequence_multiple > 1:
            msg = "a KVCache does not go with sequence parallelism, which pads the new tokens"
            raise ValueError(msg)
        seq = tokens.shape[1]
        if attention_mask is not None and attention_mask.shape != (tokens.shape[0], past + seq):
            msg = (
                f"attention_mask must be (batch, cached + new) = {(tokens.shape[0], past + seq)}, "
                f"got {tuple(attention_mask.shape)}"
            )
            raise ValueError(msg)
        h_BSD = tokens
        if not self.embeds:
            tokens = tokens[..., 0]  # from here on only shape and device count
        if positions is None:
            positions = default_positions(tokens, attention_mask, past)
        extra = -seq % self.sequence_multiple
        if extra:
            # Nothing looks at what comes after it, and the logits there are cut off.
            tokens, positions = _pad(tokens, extra), _pad(positions, extra)
            attention_mask = None if attention_mask is None else _pad(attention_mask, extra)
        masks = {
            window: visibility(tokens, attention_mask, past, window)
            for window in dict.fromkeys(self.windows)
        }

        if self.embeds:
            h_BSD = self.tok_embeddings(tokens)
            if self.embedding_scale is not None:
                # Rounded to the compute dtype first, as the models were trained.
                h_BSD = h_BSD * torch.tensor(self.embedding_scale, dtype=h_BSD.dtype)
        turns = self.rope(positions, h_BSD.dtype)
        local = turns if self.local_rope is None else self.local_rope(positions, h_BSD.dtype)
        for name, block in self.layers.items():
            window = self.windows[int(name)]
            cos, sin = turns if window is None else local
            h_BSD = block(h_BSD, cos, sin, masks[window], cache)
        if cache is not None:
            cache.advance(seq)
        if not self.predicts:
            return h_BSD
        h_BSD = self.norm(h_BSD)
        logits = self._logits(h_BSD)
        # FSDP2 wants no view of what it is handed.
        return logits[:, :seq].contiguous() if extra else logits

    def _logits(self, h_BSD: Tensor) -> Tensor:
        """(B, S, V) logits of normed hidden states."""
        if self.output is None:
            logits = self.tied_head(h_BSD, self.tok_embeddings.weight)
        else:
            logits = self.output(h_BSD)
        if self.logit_softcap is not None:
            logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
        return logits


def _pad(x_BS: Tensor, extra: int) -> Tensor:
    return functional.pad(x_BS, (0, extra))


def _norm(config: DecoderConfig) -> RMSNorm:
    return RMSNorm(config.hidden_size, config.rms_norm_eps, offset=config.traits().offset_norms)
