"""Canonical names of parameters and buffers: what a checkpoint calls them.

Activation checkpointing, ``torch.compile`` and DDP wrap modules and so change the path to a
parameter. None of that may reach a saved name, or a run could not resume without the wrapper.
"""

from __future__ import annotations

import operator
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

    That is the parameters that require a gradient, those of adapters whether they train at the
    moment or not (see :func:`adapter_parts`), and the persistent buffers of the modules that own
    one of these; if nothing is frozen, all persistent buffers. Tied parameters count once, under
    their first name. Parameters that FSDP2 holds gathered become shards again (local and cheap;
    not for use during a forward).

    Returns:
        ``id(parameter)`` to canonical FQN, and (canonical FQN, tensor) pairs in model order.
    """
    names: dict[int, str] = {}
    found: list[tuple[str, torch.Tensor]] = []
    buffers: list[tuple[bool, str, torch.Tensor]] = []
    owned: set[str] = set()
    below: set[str] = set()
    frozen = False
    for path, module in walk(model):
        if isinstance(module, FSDPModule):
            # After a forward without a backward FSDP2 leaves the root's parameters gathered and
            # cast. Parents come first, so what a module manages is its shards when it is reached.
            module.reshard()
        prefix = f"{path}." if path else ""
        parameters, containers = adapter_parts(module)
        owned.update(prefix + name for name in parameters)
        below.update(prefix + name for name in containers)
        inside = path in below or path.rpartition(".")[0] in below
        if inside:
            below.add(path)
        trains = inside or bool(parameters)
        for name, parameter in module.named_parameters(recurse=False):
            kept = parameter.requires_grad or inside or prefix + name in owned
            trains = trains or kept
            if id(parameter) in names:
                continue
            names[id(parameter)] = prefix + name
            if kept:
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


def adapter_parts(module: nn.Module) -> tuple[Collection[str], Collection[str]]:
    """What of a module belongs to adapters, by the protocols of this project and of PEFT.

    PEFT's layers name the containers in which they keep one entry an adapter. It makes only the
    active adapter require a gradient, so what is saved must not depend on that: a run that
    switches between its policy and a frozen reference resumes with both. A module of this
    project names what trains in ``adapter_params()``, and in ``frozen_adapter_params()``, if it
    has that, the parameters of adapters that do not.

    Returns:
        Names relative to the module: of parameters, and of children all of whose parameters
        are adapters'.
    """
    own: list[str] = []
    for method in ("adapter_params", "frozen_adapter_params"):
        told = getattr(module, method, None)
        own += told() if callable(told) else []
    containers = getattr(type(module), "adapter_layer_names", ())
    if not isinstance(containers, tuple) or not hasattr(module, "active_adapters"):
        containers = ()
    return own, [name for name in containers if name in module._modules]


class TrainableWalk:
    """:func:`trainable` of one model, remembered for as long as the model is the same.

    Walking a model costs more than anything else that a save does before it copies. Whether
    the model is still what was walked takes a fraction of that: every table of children,
    parameters and buffers must hold the same objects under the same names.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules: tuple[nn.Module, ...] = ()
        self._seen: tuple[list[object], list[object]] = ([], [])
        self._found: tuple[dict[int, str], list[tuple[str, torch.Tensor]]] = ({}, [])

    def __call__(self) -> tuple[dict[int, str], list[tuple[str, torch.Tensor]]]:
        """What :func:`trainable` gives now; raises as it does. Not to be changed."""
        if not self._modules or not self._same():
            self._modules = ()
            self._found = trainable(self._model)
            modules = tuple(self._model.modules())
            # A module that names its own members may change them unseen: it is walked every time.
            if not any(map(_names_its_own, modules)):
                self._modules = modules
                self._seen = self._look()
        return self._found

    def _same(self) -> bool:
        objects, facts = self._look()
        return (
            facts == self._seen[1]
            and len(objects) == len(self._seen[0])
            and all(map(operator.is_, objects, self._seen[0]))
        )

    def _look(self) -> tuple[list[object], list[object]]:
        """What the walk depends on: objects to be the same, and facts to be equal."""
        tables: list[dict[str, object]] = []
        flags: list[object] = []
        buffered: list[object] = []
        for module in self._modules:
            tables += (module._modules, module._parameters, module._buffers)  # type: ignore[arg-type]  # any values
            flags += [p is not None and p.requires_grad for p in module._parameters.values()]
            if module._buffers:
                names = set(module._non_persistent_buffers_set)
                buffered.append((names, hasattr(module, "adapter_params")))
        objects = [value for table in tables for value in table.values()]
        names_of = [tuple(table) for table in tables]
        return objects, [list(map(type, self._modules)), names_of, flags, buffered]


_MEMBERS = ("named_modules", "named_parameters", "named_buffers", "_named_members", "modules")


def _names_its_own(module: nn.Module) -> bool:
    """Whether a module, or its class, says by itself what belongs to it.

    Torch's own wrappers of activation checkpointing do, but only take their prefix off the names.
    """
    return any(not getattr(module, name).__module__.startswith("torch.") for name in _MEMBERS)
