"""Styles that split a module's matrices over ranks, with or without an adapter beside them.

Parameters become DTensors and stay parameters: checkpoints see where each shard lies, and FSDP2
reduces their gradients. A module then computes on its own shards, as plain tensors; every step from
one layout of a tensor to another, forward and backward, is a DTensor's. The gradient of a factor
that all ranks have whole is a sum over ranks in the backward pass, and DTensor takes that sum too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from .errors import ParallelConfigError
from .layouts import (
    BY_FEATURE,
    WHOLE,
    distribute_parameters,
    gather_features,
    owner_of,
    relayout,
)
from .placement import local_slice


@runtime_checkable
class SplitsFactors(Protocol):
    """A layer with adapters that can lie beside a split base."""

    def split_factors(self) -> list[tuple[str, str]]:
        """Local names of A and B of every adapter here.

        Raises:
            LoRAConfigError: an adapter with a setting that a split layer cannot compute.
        """
        ...


@dataclass(frozen=True, slots=True)
class _Part:
    """How one parameter lies, and how the gradient of what is computed with it does."""

    placement: Placement
    grad: Placement


class _LocalForward:
    """A module's forward on this rank's shards: what stands in the place of its ``forward``."""

    def __init__(self, style: LocalStyle, module: nn.Module, parts: Mapping[str, _Part]) -> None:
        self.style = style
        self.module = module
        self.grads = [(*owner_of(module, name), part.grad) for name, part in parts.items()]

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        module, style = self.module, self.style
        x = style.enter(module, x)
        with _on_shards(self.grads, hidden=style.hidden(module)):
            y = style.compute(module, x, *args, **kwargs)
        return style.leave(module, y)


@contextmanager
def _on_shards(
    grads: list[tuple[nn.Module, str, Placement]], *, hidden: tuple[str, ...]
) -> Iterator[None]:
    """Within the block modules have plain local tensors in the place of their DTensors."""
    kept = [(owner, name, owner._parameters[name]) for owner, name, _ in grads]
    try:
        for owner, name, grad in grads:
            parameter = owner._parameters[name]
            owner._parameters[name] = None if name in hidden else _local(parameter, grad)
        yield
    finally:
        for owner, name, parameter in kept:
            owner._parameters[name] = parameter


def _local(parameter: Tensor | None, grad: Placement) -> nn.Parameter | None:
    """A parameter's shard, such that its gradient comes back in the parameter's own layout."""
    if not isinstance(parameter, DTensor):
        return parameter  # type: ignore[return-value]  # None, or a caller's own plain parameter
    if isinstance(grad, Partial) and parameter.requires_grad and torch.is_grad_enabled():
        # No step forward; backward, DTensor sums the gradient over the ranks here. Left to FSDP2 or
        # the optimizer, it would be a partial sum wherever neither of them asks.
        parameter = parameter.redistribute(placements=parameter.placements)
    return parameter.to_local(grad_placements=[grad])  # type: ignore[return-value]  # torch's rule


class LocalStyle(ParallelStyle):
    """A style that lets a module compute on its shards.

    Subclasses say how parameters lie, and what happens to the first argument and to the result.
    """

    mesh: DeviceMesh
    apart: str | None = None
    """How the names of parameters begin that somebody else places."""

    def parts(self, module: nn.Module) -> dict[str, _Part]:
        """How every parameter of the module lies, by local name."""
        raise NotImplementedError

    def enter(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input as the computation wants it."""
        return x

    def leave(self, module: nn.Module, y: Tensor) -> Tensor:
        """The result as the next module wants it."""
        return y

    def hidden(self, module: nn.Module) -> tuple[str, ...]:
        """Parameters that the computation must not see."""
        return ()

    def compute(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own forward, on shards."""
        y: Tensor = type(module).forward(module, x, *args, **kwargs)
        return y

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh = device_mesh
        parts = self.parts(module)
        names = {name for name, _ in module.named_parameters()}
        if self.apart is not None:
            apart = {name for name in names if name.startswith(self.apart)}
            parts = {name: part for name, part in parts.items() if name not in apart}
            names -= apart
        left = names - parts.keys()
        if left:
            kind = type(module).__name__
            msg = f"{type(self).__name__} has no place for {', '.join(sorted(left))} of a {kind}"
            raise ParallelConfigError(msg)
        distribute_parameters(module, device_mesh, {n: p.placement for n, p in parts.items()})
        module.forward = _LocalForward(self, module, parts)
        return module


class ColumnParallel(LocalStyle):
    """A linear layer whose outputs are split: weight and bias on dimension 0.

    Of an adapter, A is whole on every rank and B is split like the base's output, so that the sum
    needs no communication.

    Args:
        input_layout: of the input: whole, by sequence, or None where the module around it has made
            it whole already and sums its gradient (:class:`Entered`).
        output_layout: by feature, or whole.
    """

    def __init__(
        self,
        *,
        input_layout: Placement | None = WHOLE,
        output_layout: Placement = BY_FEATURE,
    ) -> None:
        super().__init__()
        self.input_layout = input_layout
        self.output_layout = output_layout

    def parts(self, module: nn.Module) -> dict[str, _Part]:
        """Base and B on dimension 0, A whole."""
        parts = _base(module, weight=Shard(0), bias=Shard(0))
        for a, b in _factors(module):
            parts |= {a: _Part(WHOLE, Partial()), b: _Part(Shard(0), Shard(0))}
        return parts

    def enter(self, module: nn.Module, x: Tensor) -> Tensor:
        """The whole input; each rank's gradient of it is a partial sum."""
        if self.input_layout is None:
            return x
        return relayout(x, self.mesh, self.input_layout, WHOLE, grad=Partial())

    def leave(self, module: nn.Module, y: Tensor) -> Tensor:
        """Split outputs, or gathered ones."""
        if not isinstance(self.output_layout, Replicate):
            return y
        return gather_features(y, self.mesh, _linear(module).out_features)


class RowParallel(LocalStyle):
    """A linear layer whose inputs are split: weight on dimension 1, bias whole.

    Of an adapter, A is split like the base's input and B is whole: B's partial sums join the base's
    before their one reduction, and the bias comes after it.

    Args:
        output_layout: whole, or by sequence.
    """

    def __init__(self, *, output_layout: Placement = WHOLE) -> None:
        super().__init__()
        self.output_layout = output_layout

    def parts(self, module: nn.Module) -> dict[str, _Part]:
        """Base and A on dimension 1, bias and B whole."""
        whole = isinstance(self.output_layout, Replicate)
        parts = _base(module, weight=Shard(1), bias=WHOLE)
        if "bias" in parts and not whole:
            parts["bias"] = _Part(WHOLE, Partial())  # each rank sees some positions
        for a, b in _factors(module):
            parts |= {a: _Part(Shard(1), Shard(1)), b: _Part(WHOLE, Partial())}
        return parts

    def hidden(self, module: nn.Module) -> tuple[str, ...]:
        """The bias, which every rank would add."""
        return ("bias",)

    def leave(self, module: nn.Module, y: Tensor) -> Tensor:
        """The sum over ranks, plus the bias once."""
        y = relayout(y, self.mesh, Partial(), self.output_layout)
        bias = module._parameters.get("bias")
        if bias is None:
            return y
        grad = WHOLE if isinstance(self.output_layout, Replicate) else Partial()
        local = _local(bias, grad)
        return y if local is None else y + local.to(y.dtype)


class VocabularyParallel(LocalStyle):
    """An embedding whose rows are split: each rank looks up its own, and the results are summed.

    Of an adapter, A is split like the rows and B is whole.

    Args:
        output_layout: whole, or by sequence.
    """

    def __init__(self, *, output_layout: Placement = WHOLE) -> None:
        super().__init__()
        self.output_layout = output_layout

    def parts(self, module: nn.Module) -> dict[str, _Part]:
        """The rows."""
        special = (getattr(module, name, None) for name in ("padding_idx", "max_norm"))
        if not isinstance(module, nn.Embedding) or any(value is not None for value in special):
            msg = (
                "VocabularyParallel is for an nn.Embedding without padding_idx and max_norm, got "
                f"{module!r}"
            )
            raise ParallelConfigError(msg)
        parts = {"weight": _Part(Shard(0), Shard(0))}
        for a, b in _factors(module):
            parts |= {a: _Part(Shard(1), Shard(1)), b: _Part(WHOLE, Partial())}
        return parts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        rows = local_slice(module.get_parameter("weight"))[0]
        # On the module, not here: one style may be given to several.
        module.vocabulary_rows = rows  # type: ignore[assignment]  # modules take any attribute
        return module

    def compute(self, module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Embeddings of the tokens whose rows lie here, zero for the others."""
        rows: slice = module.__dict__["vocabulary_rows"]
        if rows.start == rows.stop:
            # Of the parameters, so that their gradients exist and every rank joins what follows.
            nothing = torch.stack([p.sum() for p in module.parameters()]).sum() * 0.0
            weight = module.get_parameter("weight")
            return weight.new_zeros(*x.shape, weight.shape[1]) + nothing
        elsewhere = (x < rows.start) | (x >= rows.stop)
        inside = (x - rows.start).masked_fill(elsewhere, 0)
        found = super().compute(module, inside, *args, **kwargs)
        return found.masked_fill(elsewhere[..., None], 0.0)

    def leave(self, module: nn.Module, y: Tensor) -> Tensor:
        """The sum over ranks, of which one is not zero."""
        return relayout(y, self.mesh, Partial(), self.output_layout)


class Whole(LocalStyle):
    """A module that every rank has whole.

    Args:
        grad: layout of its parameters' gradients: whole where all ranks compute the same, partial
            where each sees some heads or positions.
    """

    def __init__(self, *, grad: Placement = WHOLE) -> None:
        super().__init__()
        self.grad = grad

    def parts(self, module: nn.Module) -> dict[str, _Part]:
        """Everything whole."""
        rates = [m.p for m in module.modules() if isinstance(m, nn.Dropout)]
        if any(rates):
            msg = (
                f"a {type(module).__name__} with dropout={max(rates):g} does not go with tensor "
                "parallelism: ranks would draw different masks for the same input; set it to 0"
            )
            raise ParallelConfigError(msg)
        return {name: _Part(WHOLE, self.grad) for name, _ in module.named_parameters()}


class Gathered(Whole):
    """A module that every rank has whole and computes for all positions of a sequence.

    Args:
        layout: of input and output: whole, or by sequence.
    """

    def __init__(self, *, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def enter(self, module: nn.Module, x: Tensor) -> Tensor:
        """All positions; all ranks compute the same gradient of them."""
        if isinstance(self.layout, Replicate):
            return x
        return relayout(x, self.mesh, self.layout, WHOLE)

    def leave(self, module: nn.Module, y: Tensor) -> Tensor:
        """The positions of this rank."""
        if isinstance(self.layout, Replicate):
            return y
        return relayout(y, self.mesh, WHOLE, self.layout)


class Entered(ParallelStyle):
    """A module whose input several column-parallel layers share.

    The input is made whole once, and its gradient summed once, for all of them.

    Args:
        layout: of the input: whole, or by sequence.
    """

    def __init__(self, *, layout: Placement) -> None:
        super().__init__()
        self.layout = layout

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x, *rest = args
            return relayout(x, device_mesh, self.layout, WHOLE, grad=Partial()), *rest

        module.register_forward_pre_hook(enter)
        return module


def _linear(module: nn.Module) -> nn.Linear:
    if not isinstance(module, nn.Linear):
        msg = f"only nn.Linear can be split by column or row, got {type(module).__name__}"
        raise ParallelConfigError(msg)
    return module


def _base(module: nn.Module, *, weight: Placement, bias: Placement) -> dict[str, _Part]:
    parts = {"weight": _Part(weight, weight)}
    if _linear(module).bias is not None:
        parts["bias"] = _Part(bias, bias)
    return parts


def _factors(module: nn.Module) -> list[tuple[str, str]]:
    """Names of A and B of the adapters of a module, if it has any that can be split."""
    return module.split_factors() if isinstance(module, SplitsFactors) else []
