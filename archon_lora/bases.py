"""What may lie below an adapter: plain linear layers, and those with weights of another kind.

A base need not be an ``nn.Linear`` itself: subclasses with a forward of their own (quantised
layers) keep it, and a weight may be a tensor subclass that multiplies in its own way.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import MergeError, TargetError

_HOOKS: Final = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_LOAD_HOOKS: Final = "_load_state_dict_pre_hooks"


def check_base(module: nn.Module, name: str) -> nn.Linear:
    """Make sure that a module can be the base of a LoRALinear.

    Args:
        module: the candidate.
        name: how to call it in errors.

    Returns:
        The module.

    Raises:
        TargetError: not a linear layer, one whose forward was replaced on the object, or one with
            hooks (which the new layer would lose).
    """
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    where = f"module {name!r}" if name else "the module"
    if not isinstance(module, nn.Linear):
        msg = f"{where} is a {kind}; only nn.Linear and nn.Embedding can take an adapter"
        raise TargetError(msg)
    if hasattr(module, "adapter_params"):
        msg = f"{where} is a {kind}, which holds an adapter already"
        raise TargetError(msg)
    plain: dict[str, Any] = module.__dict__.get("_parameters", {})
    if "forward" in module.__dict__:
        msg = (
            f"{where} is a {kind} whose forward was replaced on the object itself, where an "
            "adapter would be lost; only a forward of its class can be adapted"
        )
        raise TargetError(msg)
    if plain.get("weight") is None:
        msg = f"{where} has no plain parameter 'weight' (parametrised, or not materialised yet)"
        raise TargetError(msg)
    check_unhooked(module, where)
    return module


def check_unhooked(module: nn.Module, where: str) -> None:
    """Make sure that a module has no hooks, which the one in its place would not have.

    Raises:
        TargetError: names them.
    """
    hooked = [attribute for attribute in _HOOKS if getattr(module, attribute, None)]
    # A class may set such hooks up by itself. They move with it, unless they hold the old object.
    held = [h for h in getattr(module, _LOAD_HOOKS).values() if getattr(h, "module", None)]
    hooked += [_LOAD_HOOKS] if held else []
    if hooked:
        msg = f"{where} has hooks that would be lost ({', '.join(hooked)}); add them afterwards"
        raise TargetError(msg)


def take_over(layer: nn.Linear, base: nn.Linear, name: str) -> None:
    """Give a new layer what an existing one has: parameters, which freeze, buffers and class.

    Args:
        layer: of a class with a method ``_updated(base_output, x)``; built on the meta device.
        base: checked by :func:`check_base`. Of another class than ``nn.Linear`` it passes on its
            forward, its attributes and how it is saved and loaded.
        name: how to call it in errors.

    Raises:
        TargetError: attributes of the base's class that have another meaning in the layer.
    """
    for local, parameter in base.named_parameters(recurse=False):
        parameter.requires_grad_(False)
        layer.register_parameter(local, parameter)
    if type(base) is nn.Linear:
        return
    standard = vars(nn.Linear(1, 1, device="meta"))
    own = {k: v for k, v in vars(base).items() if k not in standard}
    names = (*own, *base._buffers, *base._modules)
    taken = [k for k in names if k in vars(layer) or k in layer._modules]
    if taken:
        msg = (
            f"module {name!r} is a {type(base).__qualname__} with attributes that an adapted "
            f"layer has in another meaning: {', '.join(taken)}"
        )
        raise TargetError(msg)
    vars(layer).update(own)
    layer._buffers.update(base._buffers)
    layer._non_persistent_buffers_set |= base._non_persistent_buffers_set
    layer._modules.update(base._modules)
    layer._load_state_dict_pre_hooks.update(base._load_state_dict_pre_hooks)
    weight: Any = layer.weight
    if getattr(weight, "module", None) is base:
        # A weight that is quantised on its first move tells its module about it.
        weight.module = layer
    kinds: tuple[Any, Any] = (type(layer), type(base))
    layer.__class__ = _over(*kinds)


@functools.cache
def _over(layer: type[Any], base: type[Any]) -> type[Any]:
    """The layer's class with the base's below it, whose forward computes the base."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        updated: Tensor = self._updated(base.forward(self, x, *args, **kwargs), x)
        return updated

    plain = base.forward is nn.Linear.forward
    own = {} if plain else {"forward": forward, "opaque_base": True}
    named = {"__module__": layer.__module__, "__doc__": layer.__doc__}
    return type(f"{layer.__name__}Over{base.__name__}", (layer, base), own | named)


def unsplittable_weights(model: nn.Module) -> set[nn.Parameter]:
    """Weights that ``fully_shard()`` cannot split: to be given to it as ``ignored_params``.

    Every rank then keeps them whole, as quantised weights often can be; adapters beside them are
    split as ever. A tensor subclass must know how to be cut up. A subclass of ``nn.Parameter``
    loses what it carries beside its values (a scale, say): its module must carry that as well.

    Args:
        model: an adapted model, before it is sharded.
    """
    found = set()
    for module in model.modules():
        if not (isinstance(module, nn.Linear) and hasattr(module, "adapter_params")):
            continue
        weight = module.get_parameter("weight")
        if issubclass(type(weight), nn.Parameter):
            carried = {name for name, value in vars(weight).items() if isinstance(value, Tensor)}
            fits = carried <= vars(module).keys()
        else:
            fits = _splits(weight)
        if not fits:
            found.add(weight)
    return found


def _splits(weight: Tensor) -> bool:
    try:
        torch.chunk(weight.detach(), 2)
    except (NotImplementedError, RuntimeError, AssertionError):
        # What a tensor subclass says of an operation that it lacks.
        return False
    return True


def dense_weight(weight: Tensor, shape: tuple[int, int], *, opaque: bool, name: str) -> Tensor:
    """A base's weight as an ordinary tensor; of a sharded one all ranks of its mesh must call.

    Args:
        weight: the live one.
        shape: ``(out_features, in_features)``.
        opaque: the base has a forward of its own, so that what its weight holds is not known.
        name: how to call the layer in errors.

    Returns:
        Of this shape; the live tensor where it is an ordinary one, else new, dequantised.

    Raises:
        MergeError: no weight can be told from it.
    """
    whole = weight.full_tensor() if isinstance(weight, DTensor) else weight.detach()
    for method in ("get_original_weight", "dequantize"):
        # Every tensor has a dequantize(), which is for torch's own quantised dtypes.
        if getattr(type(whole), method, None) not in (None, getattr(Tensor, method, None)):
            dense: Tensor = getattr(whole, method)()
            return dense
    if opaque or tuple(whole.shape) != shape or not whole.is_floating_point():
        msg = (
            f"the base of {name or 'this layer'} is quantised, or computed, in a way of its own "
            f"(weight {tuple(whole.shape)}, {whole.dtype}), so that nothing can be merged into "
            "it: export the adapter and merge it into the model that is not quantised"
        )
        raise MergeError(msg)
    return whole
