"""Canonical names of parameters and buffers: what a checkpoint calls them.

Activation checkpointing, ``torch.compile`` and DDP wrap modules and so change the path to a
parameter. None of that may reach a saved name, or a run could not resume without the wrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from .errors import StateError

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_DDP_CHILD = "module"


def canonical_fqn(name: str, ddp: Collection[str] = ()) -> str:
    """The name without the path components that wrappers add.

    Args:
        name: dotted path as ``named_parameters()`` gives it.
        ddp: paths of the modules that are DDP wrappers (``""`` for the root). Only below those
            is ``module`` a wrapper's component; elsewhere it may be a real child's name.
    """
    kept = []
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part in _WRAPPERS:
            continue
        if part == _DDP_CHILD and ddp and ".".join(parts[:position]) in ddp:
            continue
        kept.append(part)
    return ".".join(kept)


def ddp_paths(model: nn.Module) -> frozenset[str]:
    """Paths of all DDP wrappers inside a model, the model itself included.

    Raises:
        StateError: a module is wrapped by FSDP1, whose flat parameters differ from rank to rank
            without saying so.
    """
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            found.add(path)
        elif isinstance(module, FullyShardedDataParallel):
            msg = (
                f"module {path or '<root>'} is wrapped by FullyShardedDataParallel (FSDP1), whose "
                "flat parameters cannot be resharded; use torch.distributed.fsdp.fully_shard"
            )
            raise StateError(msg)
    return frozenset(found)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(canonical name, parameter) of every parameter, tied ones once."""
    ddp = ddp_paths(model)
    for name, parameter in model.named_parameters():
        yield canonical_fqn(name, ddp), parameter


def named_persistent_buffers(
    model: nn.Module, *, everywhere: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """(canonical name, buffer) of the buffers that belong to what trains.

    Args:
        model: the model.
        everywhere: take every module's buffers (nothing is frozen). Otherwise only those of
            modules that own a trainable parameter or are adapters (have ``adapter_params``).
    """
    ddp = ddp_paths(model)
    for path, module in model.named_modules():
        trains = everywhere or callable(getattr(module, "adapter_params", None))
        trains = trains or any(p.requires_grad for p in module.parameters(recurse=False))
        if not trains:
            continue
        for name, buffer in module.named_buffers(recurse=False):
            # torch has no public way to ask whether a buffer is persistent but a full
            # state_dict(), which runs every hook of the model.
            if name not in module._non_persistent_buffers_set:
                yield canonical_fqn(f"{path}.{name}" if path else name, ddp), buffer
