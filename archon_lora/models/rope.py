"""Rotary position embedding: frequencies, their scalings, and the turning of heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .rope_config import RopeScaling

if TYPE_CHECKING:
    from typing import Self


class RotaryEmbedding(nn.Module):
    """Rotary angles for given positions.

    ``inv_freq`` follows from the configuration, so it is not stored in checkpoints. It is made
    anew whenever the module is moved, cast or materialised: ``to_empty()`` would leave garbage
    in it, and a cast to bf16 would bend the angles of long sequences.
    """

    inv_freq: Tensor

    def __init__(self, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.theta = theta
        self.scaling = scaling
        self.amplitude = 1.0 if scaling is None else _amplitude(scaling)
        self.register_buffer("inv_freq", self._frequencies(None), persistent=False)

    def _frequencies(self, device: torch.device | None) -> Tensor:
        return frequencies(self.head_dim, self.theta, self.scaling, device)

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
        cos, sin = angles.cos(), angles.sin()
        if self.amplitude != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos.to(dtype), sin.to(dtype)


def rotate(x_BHSE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (e, e + E/2) of each head by their angle."""
    first, second = x_BHSE.chunk(2, dim=-1)
    return x_BHSE * cos + torch.cat((-second, first), dim=-1) * sin


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device | None
) -> Tensor:
    """``theta ** (-2i / head_dim)`` for each rotary pair i, scaled; fp32, (head_dim / 2,)."""
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    plain = 1.0 / theta ** (pair / head_dim)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        stretched = _llama3_share(plain, scaling)
    else:
        stretched = _yarn_share(head_dim, theta, scaling, device)
    return stretched * (plain / scaling.factor) + (1 - stretched) * plain


def _llama3_share(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """How much of each pair is stretched, by its turns within the original length.

    All of it below ``low_freq_factor`` turns, none above ``high_freq_factor``, linear between
    (Llama 3.1's reference implementation).
    """
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return 1 - ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_share(
    head_dim: int, theta: float, scaling: RopeScaling, device: torch.device | None
) -> Tensor:
    """How much of each pair is stretched: a ramp over pair indices (YaRN, arXiv 2309.00071).

    The ramp runs between the pairs that turn ``beta_fast`` and ``beta_slow`` times within the
    original length; its upper end is bounded by ``head_dim - 1``, as in the reference code.
    """

    def pair_turning(times: float) -> float:
        length = scaling.original_max_position_embeddings
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_turning(scaling.beta_fast), pair_turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step, without a division by zero
    index = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return ((index - first) / (last - first)).clamp(0, 1)


def _amplitude(scaling: RopeScaling) -> float:
    """What cosine and sine are multiplied by: YaRN's ``0.1 ln(factor) + 1`` unless given."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.kind != "yarn" or scaling.factor <= 1:
        return 1.0
    return 0.1 * math.log(scaling.factor) + 1.0
