"""LoRALinear: a linear layer with a frozen base and a low-rank update beside it.

Shape suffixes: ``_XI`` input features last, ``_XO`` output features last.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LoRAConfig
from .errors import NoAdapterError, TargetError
from .init import initial_value
from .merge import merge_factors
from .placement import copy_global_

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class LoRAFactor(nn.Linear):
    """A or B: an ``nn.Linear`` without bias whose values its LoRALinear sets."""

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


class LoRALinear(nn.Linear):
    """``y = x W^T + b + scaling * dropout(x) A^T B^T``, after torchtune's LoRALinear.

    The base weight keeps its name (``<module>.weight``). The children are spelled ``lora_a`` and
    ``lora_b``, as in torchtune and Archon; PEFT's spelling is ``lora_A`` and ``lora_B``, and the
    conversion to it happens on export and load only.

    The base weight and bias are frozen by construction. B starts at zero, so the first output
    equals the base layer's. The factors may have another dtype than the base: the input is cast
    to A's dtype, the sum taken in the wider of the two and cast back to the base's output dtype,
    as PEFT does it.

    Attributes:
        lora_a: A, weight of shape ``(rank, in_features)``.
        lora_b: B, weight of shape ``(out_features, rank)``.
        rank: inner dimension.
        alpha: numerator of the scaling.
        scaling: the factor on the update.
        disabled: when true, forward computes the base layer alone.
        fqn: canonical name of this module in the model; seeds the initial values.
    """

    lora_a: nn.Linear
    lora_b: nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        bias: bool = True,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        fqn: str = "",
        seed: int = 0,
    ) -> None:
        """Build base and adapter.

        Args:
            in_features: size of the last dimension of the input.
            out_features: size of the last dimension of the output.
            rank: inner dimension of the update.
            alpha: numerator of the scaling.
            bias: whether the base layer has a bias.
            dropout: probability, in training, of zeroing an element of the adapter's input.
            use_rslora: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
            init: initial values of A, ``"kaiming"`` or ``"gaussian"``.
            adapter_dtype: dtype of A and B.
            device: where to build; on ``"meta"`` call :meth:`reset_adapter` after ``to_empty``.
            dtype: dtype of the base.
            fqn: canonical name of this module. Layers without one start from the same A.
            seed: with the name, the seed of A.

        Raises:
            LoRAConfigError: a setting of the adapter that cannot work.
        """
        settings = LoRAConfig(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            use_rslora=use_rslora,
            init=init,
            adapter_dtype=adapter_dtype,
            seed=seed,
        )
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.rank = settings.rank
        self.alpha = settings.alpha
        self.scaling = settings.scaling_for(fqn)
        self.init = init
        self.fqn = fqn
        self.seed = seed
        self.disabled = False
        self.dropout = nn.Dropout(dropout)
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        where = self.weight.device
        self.lora_a = LoRAFactor(in_features, rank, device=where, dtype=adapter_dtype)
        self.lora_b = LoRAFactor(rank, out_features, device=where, dtype=adapter_dtype)
        if where.type != "meta":
            self.reset_adapter()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        use_rslora: bool = False,
        init: str = "kaiming",
        adapter_dtype: torch.dtype = torch.float32,
        fqn: str = "",
        seed: int = 0,
    ) -> LoRALinear:
        """Put an adapter beside an existing layer, whose weight and bias are shared, not copied.

        The layer's parameters are frozen, since they are the same objects.

        Args:
            linear: the base; its forward must be that of ``nn.Linear``.
            rank: as in the constructor, like all that follow.
            alpha: as in the constructor.
            dropout: as in the constructor.
            use_rslora: as in the constructor.
            init: as in the constructor.
            adapter_dtype: as in the constructor.
            fqn: as in the constructor.
            seed: as in the constructor.

        Returns:
            A layer on the device of the base, in its training mode.

        Raises:
            LoRAConfigError: a setting of the adapter that cannot work.
            TargetError: the layer computes something else than ``x W^T + b``.
        """
        check_base(linear, fqn)
        layer = cls(
            linear.in_features,
            linear.out_features,
            rank=rank,
            alpha=alpha,
            bias=linear.bias is not None,
            dropout=dropout,
            use_rslora=use_rslora,
            init=init,
            adapter_dtype=adapter_dtype,
            device="meta",  # so that no second base weight is allocated
            fqn=fqn,
            seed=seed,
        )
        for name, parameter in linear.named_parameters(recurse=False):
            parameter.requires_grad_(False)
            layer.register_parameter(name, parameter)
        if linear.weight.device.type != "meta":
            layer.lora_a.to_empty(device=linear.weight.device)
            layer.lora_b.to_empty(device=linear.weight.device)
            layer.reset_adapter()
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        base_XO = F.linear(x, self.weight, self.bias)
        if self.disabled:
            return base_XO
        adapter_XI = x.to(self.lora_a.weight.dtype)
        update_XO: Tensor = self.lora_b(self.lora_a(self.dropout(adapter_XI)))
        return (base_XO + update_XO * self.scaling).to(base_XO.dtype)

    def adapter_params(self) -> list[str]:
        """Names, relative to this module, of the parameters that belong to the adapter."""
        return ["lora_a.weight", "lora_b.weight"]

    def reset_adapter(self) -> None:
        """Write the initial values: A drawn from (seed, name), B zero; the base is not touched.

        Works on plain parameters and on DTensors of any placement, without communication.

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        if self.lora_a.weight.is_meta or self.lora_b.weight.is_meta:
            msg = (
                f"the adapter of {self.fqn or 'this layer'} is on the meta device; call "
                "to_empty(device=...) on the model first"
            )
            raise NoAdapterError(msg)
        prefix = f"{self.fqn}." if self.fqn else ""
        for name, factor, kind in (
            ("lora_a", self.lora_a, self.init),
            ("lora_b", self.lora_b, "zeros"),
        ):
            value = initial_value(self.seed, f"{prefix}{name}.weight", factor.weight.shape, kind)
            copy_global_(factor.weight, value)

    def reset_parameters(self) -> None:
        """Draw a new base as ``nn.Linear`` does, and reset the adapter."""
        super().reset_parameters()
        if "lora_b" in self._modules:  # nn.Linear.__init__ calls this before they exist
            self.reset_adapter()

    def merged_weight(self) -> Tensor:
        """Base plus update in fp32, as a new tensor: ``W + scaling * B A``.

        On sharded parameters every rank gets the whole tensor; all ranks of the mesh must call.

        Returns:
            fp32, ``(out_features, in_features)``.
        """
        return merge_factors(self.weight, self.lora_a.weight, self.lora_b.weight, self.scaling)

    def enable(self) -> None:
        """Let forward add the update."""
        self.disabled = False

    def disable(self) -> None:
        """Let forward compute the base layer alone."""
        self.disabled = True

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        state = ", disabled" if self.disabled else ""
        return (
            f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, "
            f"scaling={self.scaling:g}, dropout={self.dropout.p:g}{state}"
        )


def check_base(module: nn.Module, name: str) -> nn.Linear:
    """Make sure that a module can be the base of a LoRALinear.

    Args:
        module: the candidate.
        name: how to call it in errors.

    Returns:
        The module.

    Raises:
        TargetError: not a linear layer, one with a computation of its own, or one with hooks
            (which the new layer would lose).
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    where = f"module {name!r}" if name else "the module"
    if not isinstance(module, nn.Linear):
        extra = " (embeddings take no adapter)" if isinstance(module, nn.Embedding) else ""
        msg = f"{where} is a {kind}{extra}; only nn.Linear can take an adapter"
        raise TargetError(msg)
    plain: dict[str, Any] = module.__dict__.get("_parameters", {})
    if type(module).forward is not nn.Linear.forward or "forward" in module.__dict__:
        msg = f"{where} is a {kind} with a forward of its own; only nn.Linear's can be adapted"
        raise TargetError(msg)
    if plain.get("weight") is None:
        msg = f"{where} has no plain parameter 'weight' (parametrised, or not materialised yet)"
        raise TargetError(msg)
    hooked = [attribute for attribute in _HOOKS if getattr(module, attribute, None)]
    if hooked:
        msg = f"{where} has hooks that would be lost ({', '.join(hooked)}); add them afterwards"
        raise TargetError(msg)
    return module
