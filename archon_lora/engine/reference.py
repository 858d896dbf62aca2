"""What a policy is compared with: the frozen base, or the adapter that it was started from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from torch import nn

from archon_lora.adapters import add_adapter, copy_adapter
from archon_lora.config import LoRAConfig
from archon_lora.errors import EngineNotReady, TargetError
from archon_lora.mode import adapter_mode
from archon_lora.names import DEFAULT_ADAPTER, REFERENCE_ADAPTER
from archon_lora.protocol import adapter_modules

if TYPE_CHECKING:
    from .engine import ArchonEngine

KEPT: Final = "reference_kept"
"""In ``engine.extra``: whether the reference holds an adapter's values. Checkpoints keep it."""


def add_reference(model: nn.Module, config: LoRAConfig) -> None:
    """Make room for a frozen copy of the policy's adapter; before sharding.

    Raises:
        TargetError: the adapter has parts that cannot be held twice.
    """
    frozen = dataclasses.replace(config, dropout=0.0)
    try:
        add_adapter(model, REFERENCE_ADAPTER, frozen, trainable=False)
    except TargetError as error:
        msg = f"no room for a reference of its own (reference='base' needs none): {error}"
        raise TargetError(msg) from error


def keep_reference(engine: ArchonEngine) -> None:
    """Freeze a copy of the adapter as it is now: the reference from here on, resumes included.

    Every rank must call; nothing is sent, since each copies its own part.

    Args:
        engine: initialised, with ``reference="warm-start"``.

    Raises:
        EngineNotReady: the engine's reference is its base.
    """
    if engine.config.reference != "warm-start":
        msg = (
            "this engine has no room for a reference of its own: set reference='warm-start' "
            "(EngineConfig(reference='warm-start'))"
        )
        raise EngineNotReady(msg)
    for part in _adapted(engine):
        copy_adapter(part, DEFAULT_ADAPTER, REFERENCE_ADAPTER)
    engine.extra[KEPT] = True


def reference_mode(engine: ArchonEngine) -> AbstractContextManager[None]:
    """Within the block the engine's model is its reference.

    Raises:
        EngineNotReady: the reference is to be a warm start's adapter, and there was none.
    """
    if engine.config.reference == "base":
        return _each(engine, "base")
    if not engine.extra.get(KEPT, False):
        msg = (
            "reference='warm-start', but no adapter was kept: call warm_start(engine, url), or "
            "keep_reference(engine) once the adapter has the values to stay near to"
        )
        raise EngineNotReady(msg)
    return _each(engine, REFERENCE_ADAPTER)


def _adapted(engine: ArchonEngine) -> list[nn.Module]:
    """The model, or the pipeline stages here that hold adapters at all."""
    return [part for part in engine.model_parts if any(True for _ in adapter_modules(part))]


@contextmanager
def _each(engine: ArchonEngine, mode: str) -> Iterator[None]:
    with ExitStack() as stack:
        for part in _adapted(engine):
            stack.enter_context(adapter_mode(part, mode))
        yield
