"""Which adapter a model computes with: the policy's, a frozen reference's, another, or none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Final
from weakref import WeakKeyDictionary

from torch import nn

from .errors import AdapterModeError, NoAdapterError
from .names import DEFAULT_ADAPTER, unwrap_ddp
from .protocol import NamedAdapters, SwitchableAdapter, adapter_modules, names_in

BASE: Final = "base"
POLICY: Final = "policy"

RESERVED_NAMES: Final = frozenset({BASE, POLICY})
"""Modes that are no adapter's name."""

_State = tuple[bool, str | None]
"""A module's ``disabled``, and its ``active`` where it has one."""


class _Block:
    """One open ``with`` block: what its modules go back to when it is left."""

    def __init__(self, modules: list[SwitchableAdapter]) -> None:
        self.before: dict[int, _State] = {id(module): _state(module) for module in modules}


_open: WeakKeyDictionary[SwitchableAdapter, list[_Block]] = WeakKeyDictionary()
"""Blocks that are open over a module, outermost first.

Kept beside the modules, so that neither a copy nor a compiled forward sees it.
"""


@contextmanager
def adapter_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Within the block the model computes with another adapter, or with none.

    At the end, after an exception too, every module gets back exactly the state it had, so blocks
    nest, and single modules that were disabled before stay so. Nothing is copied or merged: a
    reference costs no second model.

    Args:
        model: a model with adapters, sharded or wrapped or not, or a part of one.
        mode: ``"policy"``: the adapter that is active outside of all such blocks (see
            :func:`set_active`), the default one at first; ``"base"``: the frozen base alone;
            ``"reference"`` or any other name: the adapter of that name. A module that does not
            hold it computes its base alone.

    Yields:
        Nothing.

    Raises:
        NoAdapterError: there are no adapters, one cannot be switched, or none has that name.
        AdapterModeError: at the end, if a block that was entered later is still open. The state is
            left as that one made it, and leaving that one restores what was before both.
    """
    modules = _switchable(model)
    if mode not in RESERVED_NAMES:
        _check_known(modules, mode)
    targets = [_target(module, mode) for module in modules]
    block = _Block(modules)
    for module in modules:
        _open.setdefault(module, []).append(block)
    try:
        for module, state in zip(modules, targets, strict=True):
            _put(module, state)
        yield
    finally:
        _leave(block, modules)


def adapters_disabled(model: nn.Module) -> AbstractContextManager[None]:
    """Within the block the model is the frozen base; short for ``adapter_mode(model, "base")``."""
    return adapter_mode(model, BASE)


def set_active(model: nn.Module, name: str | None) -> None:
    """Choose the adapter that the model computes with from now on.

    Args:
        model: a model with adapters.
        name: an adapter's name; None for the frozen base alone, which
            :func:`enable_adapter` ends.

    Raises:
        NoAdapterError: there are no adapters, one cannot be switched, or none has that name.
        AdapterModeError: within a block of :func:`adapter_mode`, whose end would undo it.
    """
    modules = _switchable(model)
    if any(_open.get(module) for module in modules):
        msg = "set_active() within a block of adapter_mode() would be undone at the block's end"
        raise AdapterModeError(msg)
    if name is None:
        disable_adapter(model)
        return
    _check_known(modules, name)
    for module in modules:
        _put(module, _for_name(module, name))


def disable_adapter(model: nn.Module) -> None:
    """Let every adapted module compute its base alone.

    Raises:
        NoAdapterError: there are no adapters, or one that cannot be switched.
    """
    for module in _switchable(model):
        module.disable()


def enable_adapter(model: nn.Module) -> None:
    """Let every adapted module use its active adapter.

    Raises:
        NoAdapterError: there are no adapters, or one that cannot be switched.
    """
    for module in _switchable(model):
        module.enable()


def _state(module: SwitchableAdapter) -> _State:
    return module.disabled, module.active if isinstance(module, NamedAdapters) else None


def _put(module: SwitchableAdapter, state: _State) -> None:
    disabled, active = state
    if active is not None and isinstance(module, NamedAdapters):
        module.activate(active)
    if disabled:
        module.disable()
    else:
        module.enable()


def _for_name(module: SwitchableAdapter, name: str) -> _State:
    if isinstance(module, NamedAdapters):
        return False, name
    return name != DEFAULT_ADAPTER, None


def _target(module: SwitchableAdapter, mode: str) -> _State:
    """The state that a mode asks of a module."""
    if mode == BASE:
        return True, None
    if mode == POLICY:
        blocks = _open.get(module)
        return False, blocks[0].before[id(module)][1] if blocks else _state(module)[1]
    return _for_name(module, mode)


def _leave(block: _Block, modules: list[SwitchableAdapter]) -> None:
    """Restore what was before a block, or hand that on to the block that is still open."""
    early = False
    for module in modules:
        blocks = _open[module]
        place = blocks.index(block)
        before = block.before[id(module)]
        if place == len(blocks) - 1:
            _put(module, before)
        else:
            blocks[place + 1].before[id(module)] = before
            early = True
        del blocks[place]
    if early:
        msg = (
            "a block of adapter_mode() was left while one that was entered later is still open; "
            "leave them in the reverse order"
        )
        raise AdapterModeError(msg)


def _check_known(modules: list[SwitchableAdapter], name: str) -> None:
    known = dict.fromkeys(n for module in modules for n in names_in(module))
    if name not in known:
        msg = (
            f"the model has no adapter {name!r}; it has {', '.join(map(repr, known))} "
            f"(and the modes {POLICY!r} and {BASE!r}); add_adapter() adds one before sharding"
        )
        raise NoAdapterError(msg)


def _switchable(model: nn.Module) -> list[SwitchableAdapter]:
    modules = []
    for name, module in adapter_modules(model):
        if not isinstance(module, SwitchableAdapter):
            msg = (
                f"{type(module).__name__} {name!r} holds adapter parameters but has no "
                "enable(), disable() and disabled: the base model cannot be computed"
            )
            raise NoAdapterError(msg)
        modules.append(module)
    if not modules:
        kind = type(unwrap_ddp(model)).__name__
        msg = f"the model ({kind}) has no adapters: apply_lora() was not called on it"
        raise NoAdapterError(msg)
    return modules
