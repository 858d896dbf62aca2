"""Initial values of adapters: the same bits for the same seed and name, on any topology.

A value is drawn on the host for the whole (global) tensor and each rank copies its slice, so
neither the fan nor the numbers depend on how the tensor is sharded, and no broadcast is needed.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

InitKind = Literal["kaiming", "gaussian", "normal", "zeros"]


def initial_value(seed: int, fqn: str, global_shape: Sequence[int], kind: str) -> Tensor:
    """Draw the initial value of one whole parameter.

    Args:
        seed: the run's seed.
        fqn: canonical name of the parameter.
        global_shape: shape of the unsharded parameter; A is ``(..., r, in)``.
        kind: ``"kaiming"``: U(-b, b) with b = 1/sqrt(in), which is what ``kaiming_uniform_`` with
            a = sqrt(5) gives for A (PEFT, torchtune, nn.Linear); ``"gaussian"``: mean 0 and
            standard deviation 1/r (PEFT); ``"normal"``: mean 0 and standard deviation 1 (PEFT's B
            of embeddings); ``"zeros"``.

    Returns:
        fp32 tensor on the CPU.

    Raises:
        ValueError: an unknown kind.
    """
    shape = tuple(global_shape)
    if kind == "zeros":
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{fqn}".encode()).digest()
    # manual_seed takes 64 bits; torch reads them as signed.
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    if kind == "kaiming":
        bound = 1.0 / math.sqrt(shape[-1])
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if kind in ("gaussian", "normal"):
        # Drawn in fp64: the fp32 kernel for normal values differs between instruction sets.
        drawn = torch.empty(shape, dtype=torch.float64).normal_(generator=generator)
        return (drawn / shape[-2] if kind == "gaussian" else drawn).float()
    msg = f"init must be 'kaiming', 'gaussian', 'normal' or 'zeros', got {kind!r}"
    raise ValueError(msg)
