"""Keys and values of earlier tokens, for generation token by token."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, in buffers allocated once.

    Buffers take batch, heads, width, dtype and device from the first keys they are given.

    Attributes:
        capacity: most tokens per row that fit.
        length: tokens per row held so far, padding included.
    """

    def __init__(self, capacity: int) -> None:
        """Reserve nothing yet.

        Args:
            capacity: most tokens (prompt and new ones, padding included) per row.

        Raises:
            ValueError: a capacity below 1.
        """
        if capacity < 1:
            msg = f"KVCache capacity must be >= 1 token, got {capacity}"
            raise ValueError(msg)
        self.capacity = capacity
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append a layer's new keys and values, each (B, K, S, E).

        Returns:
            All keys and all values of the layer, each (B, K, length + S, E): views.

        Raises:
            ValueError: the cache is full, or the batch differs from the first call's.
        """
        batch, heads, new, width = keys.shape
        end = self.length + new
        if end > self.capacity:
            msg = f"KVCache holds {self.capacity} tokens per row, {end} are needed"
            raise ValueError(msg)
        if layer not in self._layers:
            shape = (batch, heads, self.capacity, width)
            self._layers[layer] = (
                torch.empty(shape, dtype=keys.dtype, device=keys.device),
                torch.empty(shape, dtype=values.dtype, device=values.device),
            )
        all_keys, all_values = self._layers[layer]
        if all_keys.shape[0] != batch:
            msg = f"KVCache was started with batch {all_keys.shape[0]}, got {batch}"
            raise ValueError(msg)
        all_keys[:, :, self.length : end] = keys
        all_values[:, :, self.length : end] = values
        return all_keys[:, :, :end], all_values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count the tokens that every layer has appended."""
        self.length += tokens
