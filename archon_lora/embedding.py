"""LoRAEmbedding: an embedding table with a frozen base and a low-rank update beside it.

Shape suffixes: ``_X`` token ids of any shape, ``_XR`` with the rank last, ``_XD`` with the width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import check_unhooked
from .config import LoRAConfig
from .errors import NoAdapterError, TargetError
from .factors import reset_factors
from .merge import merge_factors, whole_tensor
from .names import DEFAULT_ADAPTER
from .switch import AdapterSwitch

EMBEDDING_FACTORS: Final = ("lora_embedding_a", "lora_embedding_b")
"""Names of the parameters A and B."""


class EmbeddingPair(nn.Module):
    """One more adapter beside a table that may have a default one.

    Attributes:
        lora_embedding_a: as in :class:`LoRAEmbedding`, like all but the last.
        lora_embedding_b: as there.
        rank: as there.
        alpha: as there.
        scaling: as there.
        fqn: canonical name of this module.
        seed: as there.
        trainable: whether its parameters train.
    """

    rank: int
    alpha: float
    scaling: float
    fqn: str
    seed: int
    lora_embedding_a: nn.Parameter
    lora_embedding_b: nn.Parameter

    def __init__(
        self, base: nn.Embedding, config: LoRAConfig, *, hf: str, fqn: str, trainable: bool
    ) -> None:
        super().__init__()
        self.trainable = trainable
        _make(self, base, config, hf=hf, fqn=fqn)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
        if not base.weight.is_meta:
            _reset(self)


class EmbeddingPairs(nn.ModuleDict):
    """Adapters by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> EmbeddingPair: ...  # nn.ModuleDict says Module


class LoRAEmbedding(AdapterSwitch, nn.Embedding):
    """``W[x] + scaling * A^T[x] B^T``, as PEFT has it.

    The base weight keeps its name and is frozen. A starts at zero and B with random values, the
    other way round than in a linear layer: a row of A is one token's, and all of them must start
    alike. There is no dropout on token ids. Beside this default adapter there may be others.

    Attributes:
        lora_embedding_a: A, ``(rank, num_embeddings)``.
        lora_embedding_b: B, ``(embedding_dim, rank)``.
        rank: inner dimension.
        alpha: numerator of the scaling.
        scaling: the factor on the update.
        fqn: canonical name of this module in the model; seeds the initial values.
        seed: with the name, the seed of B.
        adapters: :class:`EmbeddingPair` by name; there only once one was added.
    """

    rank: int
    alpha: float
    scaling: float
    fqn: str
    seed: int
    lora_embedding_a: nn.Parameter
    lora_embedding_b: nn.Parameter
    adapters: EmbeddingPairs

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
        _make(self, base, config, hf=hf, fqn=fqn)
        if not base.weight.is_meta:
            _reset(self)
        self.train(base.training)

    @classmethod
    def without_default(cls, base: nn.Embedding, *, fqn: str) -> LoRAEmbedding:
        """A table that has no default adapter: it is for others, and computes its base till then.

        Args:
            base: as in the constructor.
            fqn: as in the constructor.
        """
        layer = cls(base, LoRAConfig(rank=1, alpha=1.0), hf=fqn, fqn=fqn)
        del layer.lora_embedding_a, layer.lora_embedding_b
        layer._settle()
        return layer

    def forward(self, ids_X: Tensor) -> Tensor:
        """Map token ids ``(...)`` to ``(..., embedding_dim)``."""
        base_XD = super().forward(ids_X)
        if self._alone:
            return base_XD
        adapter = self.adapter_of(self._active)
        rows_XR = F.embedding(
            ids_X,
            adapter.lora_embedding_a.T,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        # Scaled at rank width, as LoRALinear does it.
        sum_XD = base_XD + F.linear(rows_XR * adapter.scaling, adapter.lora_embedding_b)
        return sum_XD.to(base_XD.dtype)

    def adapter_params(self) -> list[str]:
        """Names, relative to this module, of the parameters of all adapters that train."""
        return self._params(trainable=True)

    def frozen_adapter_params(self) -> list[str]:
        """The same of those that do not; a run cannot go on without them, so they are saved too."""
        return self._params(trainable=False)

    def _params(self, *, trainable: bool) -> list[str]:
        return [
            local
            for name in self.adapter_names()
            if (name == DEFAULT_ADAPTER or self.adapters[name].trainable) == trainable
            for local in self.params_of(name)
        ]

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that have parameters here, the default one first."""
        default = (DEFAULT_ADAPTER,) if EMBEDDING_FACTORS[0] in self._parameters else ()
        return (*default, *(self.adapters if "adapters" in self._modules else ()))

    def params_of(self, name: str) -> list[str]:
        """Names, relative to this module, of one adapter's A and B; empty if it has none here."""
        if name not in self.adapter_names():
            return []
        prefix = "" if name == DEFAULT_ADAPTER else f"adapters.{name}."
        return [prefix + local for local in EMBEDDING_FACTORS]

    def adapter_of(self, name: str) -> LoRAEmbedding | EmbeddingPair:
        """What holds one adapter's factors, ``rank``, ``alpha`` and ``scaling``.

        Raises:
            NoAdapterError: there is no such adapter here.
        """
        if name not in self.adapter_names():
            has = ", ".join(map(repr, self.adapter_names())) or "none"
            msg = f"{self.fqn} has no adapter {name!r}; it has {has}"
            raise NoAdapterError(msg)
        return self if name == DEFAULT_ADAPTER else self.adapters[name]

    def put_adapter(self, name: str, adapter: EmbeddingPair) -> None:
        """Hold one more adapter, under a name that is not taken here."""
        if "adapters" not in self._modules:
            self.adapters = EmbeddingPairs()
        self.adapters[name] = adapter.train(self.training)
        self._settle()

    def drop_adapter(self, name: str) -> None:
        """Let go of an adapter that :meth:`put_adapter` added."""
        del self.adapters[name]
        if not self.adapters:
            del self.adapters
        self._settle()

    def split_factors(self) -> list[tuple[str, str]]:
        """Names of A and B of every adapter, for a style that splits the table over ranks."""
        names = [self.params_of(name) for name in self.adapter_names()]
        return [(a, b) for a, b in names]

    def reset_adapter(self) -> None:
        """Write the initial values of every adapter: A zero, B drawn from (seed, name).

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        for name in self.adapter_names():
            _reset(self.adapter_of(name))

    def merged_weight(self, adapter: str = DEFAULT_ADAPTER) -> Tensor:
        """Base plus update in fp32, as a new tensor: ``W + scaling * (B A)^T``; collective.

        Args:
            adapter: name of the one that is folded in.

        Raises:
            NoAdapterError: there is no such adapter here.
        """
        held = self.adapter_of(adapter)
        a, b = (whole_tensor(t) for t in (held.lora_embedding_a, held.lora_embedding_b))
        return merge_factors(self.weight, b.T, a.T, held.scaling)

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        settings = f"rank={self.rank}, alpha={self.alpha:g}"
        return f"{super().extra_repr()}, {settings}{self._switched()}"


def _make(
    holder: LoRAEmbedding | EmbeddingPair,
    base: nn.Embedding,
    config: LoRAConfig,
    *,
    hf: str,
    fqn: str,
) -> None:
    """Give a module an adapter's settings and its parameters, without values."""
    holder.rank = config.rank_for(hf)
    holder.alpha = config.alpha_for(hf)
    holder.scaling = config.scaling_for(hf)
    holder.fqn = fqn
    holder.seed = config.seed
    where, dtype = base.weight.device, config.adapter_dtype
    a = torch.empty(holder.rank, base.num_embeddings, device=where, dtype=dtype)
    b = torch.empty(base.embedding_dim, holder.rank, device=where, dtype=dtype)
    holder.lora_embedding_a, holder.lora_embedding_b = nn.Parameter(a), nn.Parameter(b)


def _reset(holder: LoRAEmbedding | EmbeddingPair) -> None:
    a, b = EMBEDDING_FACTORS
    factors = ((a, holder.lora_embedding_a, "zeros"), (b, holder.lora_embedding_b, "normal"))
    reset_factors(factors, fqn=holder.fqn, seed=holder.seed)


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
