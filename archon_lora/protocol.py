"""What a module with adapters must be able to do, and the walk that finds such modules.

Adapters are found by protocol, never by a substring of a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import nn

from .names import DEFAULT_ADAPTER, canonical_modules


@runtime_checkable
class AdapterModule(Protocol):
    """A module that holds adapter parameters."""

    def adapter_params(self) -> list[str]:
        """Names, relative to the module, of the parameters of its adapters that train."""
        ...


@runtime_checkable
class SwitchableAdapter(AdapterModule, Protocol):
    """An adapter module that can compute its base alone."""

    @property
    def disabled(self) -> bool:
        """Whether forward computes the base alone, whatever adapter is active."""
        ...

    def enable(self) -> None:
        """Let forward use the active adapter."""
        ...

    def disable(self) -> None:
        """Let forward compute the base alone."""
        ...


@runtime_checkable
class NamedAdapters(SwitchableAdapter, Protocol):
    """A switchable module that may hold several adapters, of which at most one is used.

    A switchable module without these methods counts as one that holds the default adapter only.
    """

    @property
    def active(self) -> str:
        """Name of the adapter that forward uses unless disabled.

        It may be one that this module does not hold: then forward computes the base alone.
        """
        ...

    def activate(self, name: str) -> None:
        """Let this name's adapter be the one that forward uses; does not enable."""
        ...

    def adapter_names(self) -> tuple[str, ...]:
        """The adapters that have parameters in this module, the default one first."""
        ...

    def params_of(self, name: str) -> list[str]:
        """Names, relative to the module, of one adapter's parameters; empty if it has none here."""
        ...


def adapter_modules(model: nn.Module) -> Iterator[tuple[str, AdapterModule]]:
    """Every module that follows the protocol, under its canonical name."""
    for name, module in canonical_modules(model):
        if isinstance(module, AdapterModule):
            yield name, module


def names_in(module: AdapterModule) -> tuple[str, ...]:
    """The adapters that a module holds."""
    return module.adapter_names() if isinstance(module, NamedAdapters) else (DEFAULT_ADAPTER,)


def params_in(module: AdapterModule, name: str) -> list[str]:
    """Local names of one adapter's parameters in a module; empty if it has none there."""
    if isinstance(module, NamedAdapters):
        return module.params_of(name)
    return module.adapter_params() if name == DEFAULT_ADAPTER else []
