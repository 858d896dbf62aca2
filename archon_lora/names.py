"""Names of modules and parameters as they are saved: no wrapper ever shows in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

DEFAULT_ADAPTER: Final = "default"
"""Name of the adapter that ``apply_lora()`` makes."""

REFERENCE_ADAPTER: Final = "reference"
"""Name of the frozen adapter that a policy is compared with, where that is not the bare base."""

_WRAPPERS = frozenset(
    {
        "_orig_mod",  # torch.compile(module)
        "_checkpoint_wrapped_module",  # checkpoint_wrapper(module): activation checkpointing
        "_fsdp_wrapped_module",  # FullyShardedDataParallel (FSDP1)
    }
)


def canonical_fqn(name: str) -> str:
    """The name of a module or parameter without the components that wrappers insert.

    The one place where wrapper prefixes are removed. ``module.`` is left alone: it is what
    DistributedDataParallel inserts, but also a name that a model may use itself, so
    :func:`unwrap_ddp` looks at the object instead.

    Args:
        name: a name from ``named_modules()``, ``named_parameters()`` or ``state_dict()``.

    Returns:
        The fully qualified name in the bare model.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrap_ddp(model: nn.Module) -> nn.Module:
    """The model below a DistributedDataParallel root, or the model itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, under its canonical name; wrappers are passed over.

    A wrapper forwards attributes to what it wraps, so it would look like that module.

    Args:
        model: any tree, wrapped or not.

    Yields:
        Pairs (canonical FQN, module), parents before children; the root's name is ``""``.
    """
    for name, module in unwrap_ddp(model).named_modules():
        if _WRAPPERS.isdisjoint(child for child, _ in module.named_children()):
            yield canonical_fqn(name), module


def canonical_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, under its canonical name."""
    for name, parameter in unwrap_ddp(model).named_parameters():
        yield canonical_fqn(name), parameter
