"""Passes through the stages of a pipeline, in the order of torch's own schedules.

Every rank of a pipeline is given the same rows. The first stage looks at the tokens, the last one
at the labels, and all of them at mask and positions, so that only hidden states travel.

Shape suffixes: B rows of a micro batch, S tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from archon_lora.models.pipeline import Stage, stage_of

from .batch import Batch
from .config import PipelineSchedule
from .passes import WeightedLoss, model_options

SINGLE: Final = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
"""Schedules of one stage a rank."""


@dataclass(frozen=True, slots=True)
class _Form:
    """The shape of a micro batch, for which buffers are made once."""

    rows: int
    tokens: int
    parts: int


class Pipeline:
    """The stages of this rank, and the ranks before and after it.

    Args:
        stages: this rank's, in order: number ``s`` lies on rank ``s % size`` of the group.
        group: the ranks of the pipeline.
        device: where this rank computes.
        dtype: of hidden states.
        hidden: their width.
        schedule: the order in which micro batches pass.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        dtype: torch.dtype,
        hidden: int,
        schedule: PipelineSchedule,
    ) -> None:
        self._stages = list(stages)
        self._places: list[Stage] = [stage_of(stage) for stage in stages]
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._device = device
        self._dtype, self._hidden = dtype, hidden
        self._name = schedule
        self._form: _Form | None = None
        self._schedule: Any = None
        self._loss: WeightedLoss | None = None

    def train(self, parts: Sequence[Batch], loss: WeightedLoss) -> None:
        """Add the gradients of all micro batches, which must be of one shape."""
        rows, tokens = parts[0]["input_ids"].shape
        form = _Form(int(rows), int(tokens), len(parts))
        self._loss = loss
        try:
            with self._planned(form):
                whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                first = any(place.index == 0 for place in self._places)
                self._schedule.step(
                    *((whole["input_ids"],) if first else ()),
                    # The number of the micro batch; what belongs to it, the loss knows.
                    target=torch.arange(len(parts)),
                    return_outputs=False,
                    **model_options(whole),
                )
        finally:
            self._loss = None

    def logits(self, batch: Batch) -> Tensor | None:
        """Logits ``[B, S, V]`` on the rank of the last stage, None elsewhere; without gradients."""
        ids = batch["input_ids"]
        h_BSD = ids
        for index in range(self._places[0].count):
            if index % self._size != self._rank:
                continue
            if index:
                h_BSD = torch.empty(*ids.shape, self._hidden, dtype=self._dtype, device=ids.device)
                dist.recv(h_BSD, group=self._group, group_src=(index - 1) % self._size)
            h_BSD = self._stages[index // self._size](h_BSD, **model_options(batch))
            if index == self._places[0].count - 1:
                logits_BSV: Tensor = h_BSD
                return logits_BSV
            dist.send(h_BSD.contiguous(), group=self._group, group_dst=(index + 1) % self._size)
        return None

    def share(self, value: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Give a value of the last stage's rank to all of the pipeline."""
        if value is None:
            value = torch.empty(*shape, dtype=dtype, device=self._device)
        value = value.contiguous()
        last = (self._places[0].count - 1) % self._size
        dist.broadcast(value, group=self._group, group_src=last)
        return value

    @contextmanager
    def _planned(self, form: _Form) -> Iterator[None]:
        """Within the block the schedule is one for batches of this form.

        A new schedule clears the gradients of FSDP2 modules when it begins, so those that were
        there are put aside.
        """
        kept: list[tuple[nn.Parameter, Tensor]] = []
        if form != self._form:
            self._schedule = self._make(form)
            self._form = form
            for stage in self._stages:
                kept += [(p, p.grad) for p in stage.parameters() if p.grad is not None]
            for parameter, _ in kept:
                parameter.grad = None
        try:
            yield
        except BaseException:
            self._form = None  # half-done: its buffers are of no use any more
            raise
        finally:
            with torch.no_grad():
                for parameter, grad in kept:
                    added = parameter.grad
                    parameter.grad = grad if added is None else grad.add_(added)

    def _make(self, form: _Form) -> Any:
        """A schedule that knows all shapes, so that no stage has to be run to find them out."""
        stages = [
            self._stage(stage, place, form)
            for stage, place in zip(self._stages, self._places, strict=True)
        ]
        # The loss is a mean over all rows already: nothing is left to scale.
        if self._name == "interleaved":
            return ScheduleInterleaved1F1B(
                list(stages), form.parts, loss_fn=self._loss_of, scale_grads=False
            )
        (stage,) = stages
        return SINGLE[self._name](stage, form.parts, loss_fn=self._loss_of, scale_grads=False)

    def _stage(self, stage: nn.Module, place: Stage, form: _Form) -> PipelineStage:
        def hidden(*, gradient: bool) -> Tensor:
            shape = (form.rows, form.tokens, self._hidden)
            return torch.empty(shape, dtype=self._dtype, device="meta", requires_grad=gradient)

        ids = torch.empty(form.rows, form.tokens, dtype=torch.int64, device="meta")
        return PipelineStage(
            stage,
            place.index,
            place.count,
            self._device,
            input_args=ids if place.index == 0 else hidden(gradient=place.takes_gradient),
            # Nobody is sent what the last stage returns, so its shape does not matter.
            output_args=hidden(gradient=place.gives_gradient),
            group=self._group,
        )

    def _loss_of(self, logits_BSV: Tensor, number: Tensor) -> Tensor:
        if self._loss is None:
            msg = "a schedule asks for a loss outside of train()"
            raise RuntimeError(msg)
        return self._loss(logits_BSV, int(number))
