"""Pipeline stages of an adapted model: each holds some of its modules, and exports all of them.

The adapter goes in before the model is split, so that a target counts as found wherever it is. What
an export says (targets, ranks, scalings, keys) follows from the whole model, not from the part
that a rank happens to hold; so every stage keeps the whole model on the meta device, where it has
no values and takes no memory.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import nn

from .adapter import AppliedLoRA, applied_lora, require_whole
from .frozen import FrozenMap
from .names import canonical_modules
from .peft import peft_export


def mark_stages(whole: nn.Module, stages: Iterable[nn.Module]) -> None:
    """Tell stages what they are part of; each keeps global names and exports the whole adapter.

    Call it where a model that has been through ``apply_lora()`` is split, before its stages are
    sharded.

    Args:
        whole: the adapted model, complete.
        stages: the parts that this process holds; a part may hold no adapter at all.

    Raises:
        LoRANotEnabled: ``apply_lora()`` was not called.
        TargetError: the model is sharded or wrapped by DDP already.
    """
    require_whole(whole, "mark_stages()")
    record = applied_lora(whole)
    outline = outline_of(whole)
    said = getattr(whole.adapter_export, "keywords", {})
    for stage in stages:
        there = {name for name, _ in canonical_modules(stage)}
        own = _within(record, there, outline)
        stage.lora = own  # type: ignore[assignment]  # modules take any attribute at run time
        export = functools.partial(peft_export, stage, **said)
        stage.adapter_export = export  # type: ignore[assignment]


def outline_of(model: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have shapes and dtypes, and no values."""
    shells: dict[int, object] = {}
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        shell = torch.empty_like(tensor, device="meta", requires_grad=False)
        shells[id(tensor)] = shell
        if isinstance(tensor, nn.Parameter):
            shells[id(tensor)] = nn.Parameter(shell, requires_grad=tensor.requires_grad)
    return copy.deepcopy(model, shells)


def _within(record: AppliedLoRA, there: Collection[str], whole: nn.Module) -> AppliedLoRA:
    """The part of a record that is about these modules."""
    return replace(
        record,
        matched=FrozenMap({fqn: hf for fqn, hf in record.matched.items() if fqn in there}),
        experts=FrozenMap(
            {n: hf for n, hf in record.experts.items() if n.rpartition(".")[0] in there}
        ),
        others={name: _within(other, there, whole) for name, other in record.others.items()},
        whole=whole,
    )
