"""Canonical names of parameters and buffers: what a checkpoint calls them.

Activation checkpointing, ``torch.compile`` and DDP wrap modules and so change the path to a
parameter. None of that may reach a saved name, or a run could not resume without the wrapper.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
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


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(canonical path, module) of every module, parents first.

    Raises:
        StateError: a module is wrapped by FSDP1, whose flat parameters differ from rank to rank
            without saying so.
    """
    ddp: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            ddp.add(path)
        elif isinstance(module, FullyShardedDataParallel):
            msg = (
                f"module {path or '<root>'} is wrapped by FullyShardedDataParallel (FSDP1), whose "
                "flat parameters cannot be resharded; use torch.distributed.fsdp.fully_shard"
            )
            raise StateError(msg)
        yield canonical_fqn(path, ddp), module


def trainable(model: nn.Module) -> tuple[dict[int, str], list[tuple[str, torch.Tensor]]]:
    """Every parameter's name, and what of the model belongs into a checkpoint.

    That is the parameters that require a gradient, and the persistent buffers of the modules
    that own one or are adapters (have ``adapter_params``); if nothing is frozen, all persistent
    buffers. Tied parameters count once, under their first name. Parameters that FSDP2 holds
    gathered become shards again (local and cheap; not for use during a forward).

    Returns:
        ``id(parameter)`` to canonical FQN, and (canonical FQN, tensor) pairs in model order.
    """
    names: dict[int, str] = {}
    found: list[tuple[str, torch.Tensor]] = []
    buffers: list[tuple[bool, str, torch.Tensor]] = []
    frozen = False
    for path, module in walk(model):
        if isinstance(module, FSDPModule):
            # After a forward without a backward FSDP2 leaves the root's parameters gathered and
            # cast. Parents come first, so what a module manages is its shards when it is reached.
            module.reshard()
        prefix = f"{path}." if path else ""
        trains = hasattr(module, "adapter_params")
        for name, parameter in module.named_parameters(recurse=False):
            trains = trains or parameter.requires_grad
            if id(parameter) in names:
                continue
            names[id(parameter)] = prefix + name
            if parameter.requires_grad:
                found.append((prefix + name, parameter))
            else:
                frozen = True
        for name, buffer in module.named_buffers(recurse=False):
            # torch has no public way to ask whether a buffer is persistent but a full
            # state_dict(), which runs every hook of the model.
            if name not in module._non_persistent_buffers_set:
                buffers.append((trains, prefix + name, buffer))
    found += [(name, buffer) for trains, name, buffer in buffers if trains or not frozen]
    return names, found
