"""A decoder cut into pipeline stages, which keep the names that their modules have in the whole.

The first stage has the embedding, the last one the norm and the head, and each some of the layers.
A tied head is the embedding's matrix: where that is frozen, as under LoRA, the last stage has a
copy of it, which can never differ.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from archon_lora.errors import ParallelConfigError

from .decoder import Decoder
from .loading import base_tensors


@dataclass(frozen=True, slots=True)
class Stage:
    """Which part of a pipeline a model is; its attribute ``stage``.

    Attributes:
        index: its place, from 0.
        count: number of stages.
        layers: the layers that it has.
        takes_gradient: whether anything before it trains, so that its input has a gradient.
        gives_gradient: the same of its output.
        elsewhere: names of the base's tensors that only other stages have.
    """

    index: int
    count: int
    layers: range
    takes_gradient: bool
    gives_gradient: bool
    elsewhere: frozenset[str]


def stage_layers(layers: int, stages: int) -> list[range]:
    """The layers of every stage: contiguous, and as even as can be.

    Earlier stages get the ones that are left over: the last has the head besides.

    Raises:
        ParallelConfigError: more stages than layers.
    """
    if not 1 <= stages <= layers:
        msg = f"{layers} layers cannot be cut into {stages} pipeline stages; lower parallel.pp"
        raise ParallelConfigError(msg)
    each, more = divmod(layers, stages)
    sizes = [each + (index < more) for index in range(stages)]
    ends = list(itertools.accumulate(sizes))
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def split_decoder(model: Decoder, stages: int, mine: Sequence[int]) -> list[Decoder]:
    """Some stages of a model; adapters go in before, sharding comes after.

    The stages share the tensors of the model, which is not changed. Each gets an attribute
    ``stage``.

    Args:
        model: the whole model; may be on the meta device.
        stages: number of stages.
        mine: the ones that are wanted.

    Raises:
        ParallelConfigError: more stages than layers, or a tied head whose matrix trains: its two
            copies would have to be kept equal.
    """
    layers = stage_layers(model.config.num_hidden_layers, stages)
    tied = model.output is None
    if tied and stages > 1 and any(p.requires_grad for p in model.tok_embeddings.parameters()):
        msg = (
            "the head of this model is its embedding (tie_word_embeddings), which trains or has an "
            "adapter, and would lie on the first and the last pipeline stage; adapt other modules "
            "only, which freezes it, or set pp=1"
        )
        raise ParallelConfigError(msg)
    everything = base_tensors(model).keys()
    trains = [_trains(model, layers[index], first=index == 0) for index in range(stages)]
    found = []
    for index in mine:
        part = _share_copy(model)
        _cut(part, layers[index], first=index == 0, last=index == stages - 1)
        part.stage = Stage(  # type: ignore[assignment]  # modules take any attribute at run time
            index=index,
            count=stages,
            layers=layers[index],
            takes_gradient=any(trains[:index]),
            gives_gradient=any(trains[: index + 1]),
            elsewhere=frozenset(everything - base_tensors(part).keys()),
        )
        found.append(part)
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        # Here and not above: a model without LoRA imports none of its code.
        from archon_lora.stages import mark_stages

        mark_stages(model, found)
    return found


def stage_of(model: nn.Module) -> Stage:
    """What :func:`split_decoder` noted in a stage.

    Raises:
        TypeError: the model is no stage.
    """
    stage = model.__dict__.get("stage")
    if not isinstance(stage, Stage):
        msg = f"this {type(model).__name__} is no pipeline stage: split_decoder() makes them"
        raise TypeError(msg)
    return stage


def _trains(model: Decoder, layers: range, *, first: bool) -> bool:
    """Whether anything that a stage computes its hidden states with trains."""
    modules: list[nn.Module] = [model.layers[str(layer)] for layer in layers]
    if first:
        modules.append(model.tok_embeddings)
    return any(p.requires_grad for module in modules for p in module.parameters())


def _share_copy(model: Decoder) -> Decoder:
    """A copy of a model's modules over the same tensors."""
    tensors: Iterable[Tensor] = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _cut(part: Decoder, layers: range, *, first: bool, last: bool) -> None:
    """Take away what a stage does not have."""
    for name in list(part.layers):
        if int(name) not in layers:
            del part.layers[name]
    part.embeds, part.predicts = first, last
    tied = part.output is None
    if not (first or (last and tied)):
        part.tok_embeddings = None  # type: ignore[assignment]  # embeds says that it is not used
    if not last:
        part.norm = None  # type: ignore[assignment]  # predicts says that it is not used
        part.output = None
