"""Which model families there are: the folders beside this file."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from archon_lora.errors import ModelLoadError

from .spec import ModelSpec


@functools.cache
def model_specs() -> Mapping[str, ModelSpec]:
    """Every family by its ``model_type``.

    A family is a folder in this package whose ``__init__`` has ``SPEC``; there is no other list.
    """
    package = importlib.import_module(__package__)
    specs: dict[str, ModelSpec] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            spec = importlib.import_module(f"{__package__}.{module.name}").SPEC
            specs[spec.model_type] = spec
    return MappingProxyType(dict(sorted(specs.items())))


def get_model_spec(model_type: str) -> ModelSpec:
    """The parts of a model family.

    Args:
        model_type: ``model_type`` of a ``config.json``.

    Raises:
        ModelLoadError: no such family here; the message lists those that are.
    """
    specs = model_specs()
    spec = specs.get(model_type)
    if spec is None:
        msg = f"model_type {model_type!r} is not supported; supported: {', '.join(specs)}"
        raise ModelLoadError(msg)
    return spec
