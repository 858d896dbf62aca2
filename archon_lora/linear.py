"""LoRALinear: a linear layer with a frozen base and a low-rank update beside it.

Shape suffixes: ``_XI`` input features last, ``_XO`` output features last.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bases import check_base, dense_weight, take_over
from .config import LoRAConfig
from .errors import LoRAConfigError, NoAdapterError
from .factors import LoRAFactor, LoRAPair, LoRAPairs, reset_factors
from .merge import merge_factors
from .names import DEFAULT_ADAPTER
from .switch import AdapterSwitch


class LoRALinear(AdapterSwitch, nn.Linear):
    """``y = x W^T + b + scaling * dropout(x) A^T B^T``, after torchtune's LoRALinear.

    The base weight keeps its name (``<module>.weight``). The children are spelled ``lora_a`` and
    ``lora_b``, as in torchtune and Archon; PEFT's spelling is ``lora_A`` and ``lora_B``, and the
    conversion to it happens on export and load only.

    The base weight and bias are frozen by construction. B starts at zero, so the first output
    equals the base layer's. The factors may have another dtype than the base: the input is cast
    to A's dtype, the sum taken in the wider of the two and cast back to the base's output dtype,
    as PEFT does it.

    Beside this default adapter there may be others, by name, in ``adapters``; forward uses the
    active one, or none.

    Attributes:
        lora_a: A, weight of shape ``(rank, in_features)``.
        lora_b: B, weight of shape ``(out_features, rank)``.
        rank: inner dimension.
        alpha: numerator of the scaling.
        scaling: the factor on the update.
        adapters: :class:`archon_lora.factors.LoRAPair` by name; there only once one was added.
        fqn: canonical name of this module in the model; seeds the initial values.
    """

    lora_a: nn.Linear
    lora_b: nn.Linear
    adapters: LoRAPairs
    opaque_base: ClassVar[bool] = False
    """Whether the base computes by a forward of its own class."""

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
            linear: the base. One of a subclass with its own forward (a quantised layer) keeps it,
                and its class stays among those of the new layer.
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
            TargetError: the layer cannot be a base; see :func:`archon_lora.bases.check_base`.
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
        take_over(layer, linear, fqn)
        if linear.weight.device.type != "meta":
            layer.lora_a.to_empty(device=linear.weight.device)
            layer.lora_b.to_empty(device=linear.weight.device)
            layer.reset_adapter()
        return layer.train(linear.training)

    @classmethod
    def without_default(cls, linear: nn.Linear, *, fqn: str = "") -> LoRALinear:
        """A layer that has no default adapter: it is for others, and computes its base till then.

        Args:
            linear: the base, as for :meth:`from_linear`.
            fqn: as in the constructor.

        Raises:
            TargetError: the layer cannot be a base.
        """
        layer = cls.from_linear(linear, rank=1, alpha=1.0, fqn=fqn)
        del layer.lora_a, layer.lora_b
        layer._settle()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        return self._updated(F.linear(x, self.weight, self.bias), x)

    def _updated(self, base_XO: Tensor, x: Tensor) -> Tensor:
        """The base's output with the active adapter's update."""
        if self._alone:
            return base_XO
        adapter = self if self._active == DEFAULT_ADAPTER else self.adapters[self._active]
        lora_a, dropout = adapter.lora_a, adapter.dropout
        # Of small layers every call counts: none is made that would change nothing.
        dtype = lora_a.weight.dtype
        adapter_XI = x if x.dtype is dtype else x.to(dtype)
        if dropout.p:
            adapter_XI = dropout(adapter_XI)
        # Scaled at rank width: over the output it would be one more pass, forward and backward.
        sum_XO: Tensor = base_XO + adapter.lora_b(lora_a(adapter_XI) * adapter.scaling)
        return sum_XO if sum_XO.dtype is base_XO.dtype else sum_XO.to(base_XO.dtype)

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
        default = (DEFAULT_ADAPTER,) if "lora_a" in self._modules else ()
        return (*default, *(self.adapters if "adapters" in self._modules else ()))

    def params_of(self, name: str) -> list[str]:
        """Names, relative to this module, of one adapter's A and B; empty if it has none here."""
        if name not in self.adapter_names():
            return []
        prefix = "" if name == DEFAULT_ADAPTER else f"adapters.{name}."
        return [f"{prefix}lora_a.weight", f"{prefix}lora_b.weight"]

    def split_factors(self) -> list[tuple[str, str]]:
        """Names of A and B of every adapter, for a style that splits the layer over ranks.

        Raises:
            LoRAConfigError: an adapter has dropout.
        """
        pairs = []
        for name in self.adapter_names():
            rate = self.adapter_of(name).dropout.p
            if rate:
                msg = (
                    f"{self.fqn or 'this layer'}: dropout={rate:g} with tensor parallelism: ranks "
                    "that share a layer would draw different masks for the same input, and their "
                    "copies of A would drift apart; set lora.dropout to 0"
                )
                raise LoRAConfigError(msg)
            a, b = self.params_of(name)
            pairs.append((a, b))
        return pairs

    def adapter_of(self, name: str) -> LoRALinear | LoRAPair:
        """What holds one adapter's ``lora_a``, ``lora_b``, ``rank``, ``alpha`` and ``scaling``.

        Raises:
            NoAdapterError: there is no such adapter here.
        """
        if name not in self.adapter_names():
            has = ", ".join(map(repr, self.adapter_names())) or "none"
            msg = f"{self.fqn or 'this layer'} has no adapter {name!r}; it has {has}"
            raise NoAdapterError(msg)
        return self if name == DEFAULT_ADAPTER else self.adapters[name]

    def put_adapter(self, name: str, adapter: LoRAPair) -> None:
        """Hold one more adapter, under a name that is not taken here."""
        if "adapters" not in self._modules:
            self.adapters = LoRAPairs()
        self.adapters[name] = adapter.train(self.training)
        self._settle()

    def drop_adapter(self, name: str) -> None:
        """Let go of an adapter that :meth:`put_adapter` added."""
        del self.adapters[name]
        if not self.adapters:
            del self.adapters
        self._settle()

    def reset_adapter(self) -> None:
        """Write the initial values: A drawn from (seed, name), B zero; the base is not touched.

        Those of every adapter here; a frozen one computes the base alone until it is loaded.

        Works on plain parameters and on DTensors of any placement, without communication.

        Raises:
            NoAdapterError: the parameters are on the meta device.
        """
        for name in self.adapter_names():
            adapter = self.adapter_of(name)
            if isinstance(adapter, LoRAPair):
                adapter.reset()
                continue
            reset_factors(
                (
                    ("lora_a.weight", self.lora_a.weight, self.init),
                    ("lora_b.weight", self.lora_b.weight, "zeros"),
                ),
                fqn=self.fqn,
                seed=self.seed,
            )

    def reset_parameters(self) -> None:
        """Draw a new base as ``nn.Linear`` does, and reset the adapter."""
        super().reset_parameters()
        if "lora_b" in self._modules:  # nn.Linear.__init__ calls this before they exist
            self.reset_adapter()

    def merged_weight(self, adapter: str = DEFAULT_ADAPTER) -> Tensor:
        """Base plus update in fp32, as a new tensor: ``W + scaling * B A``.

        On sharded parameters every rank gets the whole tensor; all ranks of the mesh must call.

        Args:
            adapter: name of the one that is folded in.

        Returns:
            fp32, ``(out_features, in_features)``.

        Raises:
            NoAdapterError: there is no such adapter here.
            MergeError: the base has no weight that could be added to.
        """
        chosen = self.adapter_of(adapter)
        shape = (self.out_features, self.in_features)
        weight = dense_weight(self.weight, shape, opaque=self.opaque_base, name=self.fqn)
        return merge_factors(weight, chosen.lora_a.weight, chosen.lora_b.weight, chosen.scaling)

    def extra_repr(self) -> str:
        """The settings that a reader of ``print(model)`` looks for."""
        return (
            f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}, "
            f"scaling={self.scaling:g}, dropout={self.dropout.p:g}{self._switched()}"
        )
