"""The parts of an adapter beside one linear layer: the factors A and B, and the two as a pair."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .errors import NoAdapterError
from .init import initial_value
from .placement import copy_global_


class LoRAFactor(nn.Linear):
    """A or B: an ``nn.Linear`` without bias whose values the layer that holds it sets."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Nothing: sweeps over ``module.reset_parameters()`` must not make B non-zero.

        Neither does building an adapter advance the global random generator.
        """


class LoRAPair(nn.Module):
    """One more adapter beside a linear layer that may have a default one.

    Its attributes have the names that :class:`archon_lora.linear.LoRALinear` gives its default
    adapter's.

    Attributes:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        lora_a: A, weight of shape ``(rank, in_features)``.
        lora_b: B, weight of shape ``(out_features, rank)``.
        dropout: applied to the adapter's input.
        rank: inner dimension.
        alpha: numerator of the scaling.
        scaling: the factor on the update.
        init: initial values of A.
        fqn: canonical name of this module; seeds the initial values.
        seed: with the name, the seed of A.
        trainable: whether its parameters train. A frozen one is saved with the others all the
            same: a run cannot go on without it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        scaling: float,
        dropout: float,
        init: str,
        adapter_dtype: torch.dtype,
        device: torch.device,
        fqn: str,
        seed: int,
        trainable: bool,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.alpha = alpha
        self.scaling = scaling
        self.init = init
        self.fqn = fqn
        self.seed = seed
        self.trainable = trainable
        self.dropout = nn.Dropout(dropout)
        self.lora_a = LoRAFactor(in_features, rank, device=device, dtype=adapter_dtype)
        self.lora_b = LoRAFactor(rank, out_features, device=device, dtype=adapter_dtype)
        for factor in (self.lora_a, self.lora_b):
            factor.weight.requires_grad_(trainable)

    def reset(self) -> None:
        """Write the initial values: A drawn from (seed, name), B zero.

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        reset_factors(
            (
                ("lora_a.weight", self.lora_a.weight, self.init),
                ("lora_b.weight", self.lora_b.weight, "zeros"),
            ),
            fqn=self.fqn,
            seed=self.seed,
        )

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        frozen = "" if self.trainable else ", frozen"
        return f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g}{frozen}"


class LoRAPairs(nn.ModuleDict):
    """Adapters by name."""

    if TYPE_CHECKING:

        def __getitem__(self, key: str) -> LoRAPair: ...  # nn.ModuleDict says Module


def reset_factors(factors: Iterable[tuple[str, Tensor, str]], *, fqn: str, seed: int) -> None:
    """Write the initial values of an adapter's parameters, plain or DTensors of any placement.

    Args:
        factors: local name, parameter, and the kind of its initial value.
        fqn: canonical name of the module that the local names are relative to.
        seed: the run's.

    Raises:
        NoAdapterError: a parameter is on the meta device.
    """
    todo = list(factors)
    if any(parameter.is_meta for _, parameter, _ in todo):
        msg = (
            f"the adapter of {fqn or 'this layer'} is on the meta device; call "
            "to_empty(device=...) on the model first"
        )
        raise NoAdapterError(msg)
    prefix = f"{fqn}." if fqn else ""
    for name, parameter, kind in todo:
        copy_global_(parameter, initial_value(seed, prefix + name, parameter.shape, kind))
