"""The caller's half of a save: agree whether it takes place, plan if need be, copy, hand over."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from .arena import local_tensor
from .background import Background
from .busy import BusyRule
from .errors import StepExists
from .handle import SaveHandle
from .job import Job, encode_values, subject
from .planner import Planner
from .save import EchoError
from .train_state import TrainState
from .types import SaveMetrics


class Staging:
    """Takes saves from the caller's thread to the background; counts them, alike on all ranks.

    Args:
        planner: layouts and slots.
        work: the background.
        busy: what happens when both slots are in use.
        nonce: begins the attempts of this manager.
        patience: seconds that a save waits for a slot at most.

    Attributes:
        taken: steps that this writer has saved or is saving.
    """

    def __init__(
        self, planner: Planner, work: Background, busy: BusyRule, *, nonce: str, patience: float
    ) -> None:
        self._planner = planner
        self._work = work
        self._busy = busy
        self._nonce = nonce
        self._patience = patience
        self._seq = 0
        self.taken: set[int] = set()

    def start(
        self,
        step: int | None,
        state: TrainState,
        *,
        resumable: bool,
        publish: bool,
        values: Mapping[str, float] | None = None,
        probe: Mapping[str, Any] | None = None,
        patience: float | None = None,
    ) -> SaveHandle:
        """The caller's half of a save: plan if need be, copy, hand over.

        With ``patience``, it waits that many seconds for a slot, whatever ``when_busy`` says.
        """
        started = time.perf_counter()
        seq = self._seq
        self._seq += 1
        try:
            self._work.raise_pending()
        except Exception as error:
            # Every rank knows this error; the others must not wait for this save.
            self._busy.refuse(seq, error)
            self._work.refuse(seq, error, echo=True)
            raise
        try:
            if patience is None:
                left_out = self._give_way(seq, step, resumable=resumable)
                if left_out is not None:
                    return left_out
                patience = self._patience
            agreed_ms = 1e3 * (time.perf_counter() - started)
            job = self._stage(seq, step, state, resumable, publish, started, patience)
            job.handle.metrics.wait_ms += agreed_ms
            job.metrics, job.probe = values or {}, probe
        except Exception as error:
            self._work.refuse(seq, error, echo=False)
            raise
        self._work.submit(job)
        return job.handle

    def _give_way(self, seq: int, step: int | None, *, resumable: bool) -> SaveHandle | None:
        """Apply ``when_busy``; the handle of this save if it is not to take place."""
        arena = self._planner.arena(resumable=resumable)
        left_out = SaveHandle(step, SaveMetrics(step=step, queue_depth=self._work.depth))
        try:
            choice = self._busy.choose(seq, free=arena is None or arena.available())
        except EchoError as error:
            left_out.refuse(error)  # its cause is raised by this rank's next call
            return left_out
        if choice == "skip":
            self._work.leave_out(left_out, self._attempt(seq), resumable=resumable)
            return left_out
        if choice == "drop" and arena is not None:
            self._work.drop_last(arena)
        return None

    def _stage(
        self,
        seq: int,
        step: int | None,
        state: TrainState,
        resumable: bool,
        publish: bool,
        started: float,
        patience: float,
    ) -> Job:
        if resumable and step in self.taken:
            msg = f"step {step} was saved already by this writer; committed steps are immutable"
            raise StepExists(msg)
        export, live, tensors = subject(state, resumable=resumable, publish=publish)
        planning = time.perf_counter()
        cached, planned, epoch = self._planner.layout(
            seq, step, tensors, resumable=resumable, parted=state.parted, export=export
        )
        plan_ms = 1e3 * (time.perf_counter() - planning)
        shared, mine = encode_values(state, live, resumable=resumable)
        waiting = time.perf_counter()
        slot = cached.arena.acquire(patience)
        copying = time.perf_counter()
        try:
            if slot is not None:
                with torch.no_grad():
                    sources = [local_tensor(tensors[p.name]) for p in cached.layout.mine]
                    slot.fill(sources, cached.stream)
                    slot.order_after_copy()
        except BaseException:
            cached.arena.release(slot)
            raise
        metrics = SaveMetrics(
            step=step,
            wait_ms=1e3 * (copying - waiting),
            plan_ms=plan_ms,
            copy_ms=1e3 * (time.perf_counter() - copying),
            stage_bytes=0 if slot is None else slot.nbytes,
            planned=planned,
        )
        metrics.queue_depth = self._work.depth
        handle = SaveHandle(step, metrics)
        if cached.stream is None:
            handle.staged.set_result(None)
        if resumable and step is not None:
            self.taken.add(step)
        metrics.stall_ms = 1e3 * (time.perf_counter() - started)
        return Job(
            seq=seq,
            step=step,
            resumable=resumable,
            publish=publish,
            planned=planned,
            attempt=self._attempt(seq),
            epoch=epoch,
            layout=cached.layout,
            arena=cached.arena,
            slot=slot,
            shared=shared,
            mine=mine,
            export=export,
            base=state.base,
            policy_version=state.policy_version,
            handle=handle,
            started=started,
        )

    def _attempt(self, seq: int) -> str:
        return f"{self._nonce}{seq:08d}"
