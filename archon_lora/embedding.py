"""LoRAEmbedding: an embedding table with a frozen base and a low-rank update beside it.

Shape suffixes: ``_X`` token ids of any shape, ``_XR`` with the rank last, ``_XD`` with the width.
"""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import check_unhooked
from .config import LoRAConfig
from .errors import TargetError
from .factors import reset_factors
from .merge import merge_factors, whole_tensor
from .names import DEFAULT_ADAPTER
from .switch import AdapterSwitch

EMBEDDING_FACTORS: Final = ("lora_embedding_a", "lora_embedding_b")
"""Names of the parameters A and B."""


class LoRAEmbedding(AdapterSwitch, nn.Embedding):
    """``W[x] + scaling * A^T[x] B^T``, as PEFT has it.

    The base weight keeps its name and is frozen. A starts at zero and B with random values, the
    other way round than in a linear layer: a row of A is one token's, and all of them must start
    alike. There is no dropout on token ids. It holds the default adapter only.

    Attributes:
        lora_embedding_a: A, ``(rank, num_embeddings)``.
        lora_embedding_b: B, ``(embedding_dim, rank)``.
        rank: inner dimension.
        alpha: numerator of the scaling.
        scaling: the factor on the update.
        fqn: canonical name of this module in the model; seeds the initial values.
        seed: with the name, the seed of B.
    """

    def __init__(self, base: nn.Embedding, config: LoRAConfig, *, hf: str, fqn: str) -> None:
        """Put an adapter beside an existing table, which is shared, not copied.

        Args:
            base: the table, checked by :func:`check_embedding`; its weight freezes.
            config: rank, alpha, scaling and dtype.
            hf: HF name that rank and alpha patterns are matched with.
            fqn: canonical name of this module.
        """
        super().__init__(
            base.num_embeddings,
            base.embedding_dim,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            device="meta",  # so that no second table is allocated
            dtype=base.weight.dtype,
        )
        base.weight.requires_grad_(False)
        self.weight = base.weight
        self.rank = config.rank_for(hf)
        self.alpha = config.alpha_for(hf)
        self.scaling = config.scaling_for(hf)
        self.fqn = fqn
        self.seed = config.seed
        where, dtype = base.weight.device, config.adapter_dtype
        a = torch.empty(self.rank, self.num_embeddings, device=where, dtype=dtype)
        b = torch.empty(self.embedding_dim, self.rank, device=where, dtype=dtype)
        self.lora_embedding_a, self.lora_embedding_b = nn.Parameter(a), nn.Parameter(b)
        if not base.weight.is_meta:
            self.reset_adapter()
        self.train(base.training)

    def forward(self, ids_X: Tensor) -> Tensor:
        """Map token ids ``(...)`` to ``(..., embedding_dim)``."""
        base_XD = super().forward(ids_X)
        if self._alone:
            return base_XD
        rows_XR = F.embedding(
            ids_X,
            self.lora_embedding_a.T,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        # Scaled at rank width, as LoRALinear does it.
        sum_XD = base_XD + F.linear(rows_XR * self.scaling, self.lora_embedding_b)
        return sum_XD.to(base_XD.dtype)

    def adapter_params(self) -> list[str]:
        """Names of the parameters A and B."""
        return list(EMBEDDING_FACTORS)

    def adapter_names(self) -> tuple[str, ...]:
        """The default adapter."""
        return (DEFAULT_ADAPTER,)

    def params_of(self, name: str) -> list[str]:
        """The same for the default adapter; it is the only one."""
        return self.adapter_params() if name == DEFAULT_ADAPTER else []

    def split_factors(self) -> list[tuple[str, str]]:
        """Names of A and B, for a style that splits the table over ranks."""
        return [EMBEDDING_FACTORS]

    def reset_adapter(self) -> None:
        """Write the initial values: A zero, B drawn from (seed, name).

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        a, b = EMBEDDING_FACTORS
        factors = ((a, self.lora_embedding_a, "zeros"), (b, self.lora_embedding_b, "normal"))
        reset_factors(factors, fqn=self.fqn, seed=self.seed)

    def merged_weight(self, adapter: str = DEFAULT_ADAPTER) -> Tensor:
        """Base plus update in fp32, as a new tensor: ``W + scaling * (B A)^T``; collective.

        Args:
            adapter: the default one.
        """
        a, b = (whole_tensor(t) for t in (self.lora_embedding_a, self.lora_embedding_b))
        return merge_factors(self.weight, b.T, a.T, self.scaling)

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        settings = f"rank={self.rank}, alpha={self.alpha:g}"
        return f"{super().extra_repr()}, {settings}{self._switched()}"


def check_embedding(module: nn.Embedding, name: str) -> nn.Embedding:
    """Make sure that an embedding can be the base of a LoRAEmbedding.

    Args:
        module: the candidate.
        name: how to call it in errors.

    Returns:
        The module.

    Raises:
        TargetError: a forward of its own (such as one that scales), a bound on the norm (which
            changes the table when it is read), or hooks.
    """
    where = f"module {name!r}"
    if type(module).forward is not nn.Embedding.forward or "forward" in vars(module):
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        msg = f"{where} is a {kind} with a forward of its own; only nn.Embedding's can be adapted"
        raise TargetError(msg)
    if module.max_norm is not None:
        msg = f"{where} has max_norm={module.max_norm:g}, which changes its rows when they are read"
        raise TargetError(msg)
    check_unhooked(module, where)
    return module
