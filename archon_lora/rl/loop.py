"""The training loop: generate ahead, train, save, publish.

One step ``t`` goes like this on every rank: the batch for ``t + ahead`` begins, sampled by the
newest version that samplers have; the batch for ``t``, complete since the last step, is trained on,
unless it is staler than allowed: then it is sampled anew first; what is in flight is collected; the
step is saved, and the version that samplers wait for is published. Collectives run on the main
thread alone. Who samples is :mod:`archon_lora.rl.rollouts`' part.
"""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from archon_lora.engine import ArchonEngine, keep_reference
from archon_lora.engine.agree import gather_json
from archon_lora.errors import TrainConfigError
from archon_lora.models import weights_fingerprint
from archon_lora.rl.build import (
    build_engine,
    build_manager,
    build_probe,
    build_rollouts,
    check_model_directory,
)
from archon_lora.rl.config import TrainConfig
from archon_lora.rl.metrics import MetricsWriter, ProgressDisplay
from archon_lora.rl.rollout import Batch, PromptStream, pack, unpack
from archon_lora.rl.trainer import train_on
from archon_lora.rl.warm import BASE_WEIGHTS, begin, resume, same_base
from ckpt import CheckpointManager, CkptError, TrainState

_LAST_COMMITS_S = 5.0
"""Seconds that a failed run gives to the commits that are under way."""


Told = Callable[[Mapping[str, Any]], object]


def run_training(config: TrainConfig, *, on_record: Told | None = None) -> int | None:
    """Train up to ``config.run.steps``, from the newest checkpoint or from the start.

    Takes part in the process group of a launcher (``torchrun``), or makes one of its own. A
    SIGTERM to any rank lets all of them finish the step, save it, and return.

    Args:
        config: all settings.
        on_record: on the first rank, takes every record that goes into the metrics file, in place
            of what a person is shown.

    Returns:
        None when the run is complete, or the step after which a SIGTERM ended it; that step is
        committed.

    Raises:
        TrainConfigError: a setting that cannot work, or one that may not change on a resume.
        ArchonLoraError: what the model directory or the adapter's settings cause.
        CkptError: what the checkpoints cause.
        RuntimeError: a rank died or was too late.
    """
    torch.set_num_threads(config.run.threads)
    check_model_directory(Path(config.model.path))
    with ExitStack() as stack:
        stack.enter_context(process_group(config.run.timeout_s))
        world = dist.get_world_size()
        if world > config.rollout.samples:
            msg = (
                f"{world} ranks cannot share {config.rollout.samples} samples a step; raise "
                "rollout.prompts_per_step or rollout.group_size, or start fewer ranks"
            )
            raise TrainConfigError(msg)
        engine = build_engine(config)
        engine.initialize()
        stack.callback(engine.close)
        run = Run(config, engine, build_manager(config))
        stack.callback(run.rollouts.close)
        deadline = config.checkpoint.preempt_deadline_s
        stack.callback(run.manager.save_on_signal(signal.SIGTERM, deadline=deadline))
        try:
            run.restore()
            return run.train(on_record)
        except Exception as error:
            run.abandon(error)
            raise


@contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """The default group with a deadline, so that a dead peer ends this rank too."""
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        # Alone: a store in memory opens no socket.
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in the stubs
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    yield
    # Not in a finally: after a failure the peers may be gone, and this would wait for them.
    dist.destroy_process_group()


@dataclass(slots=True)
class Progress:
    """Where the run stands; goes into every checkpoint as ``extra``.

    Attributes:
        extra: the dict that the checkpoint holds.
        ready: whole batches by step: sampled, not yet trained on.
        served: name and policy version of what sampled last.
    """

    extra: dict[str, Any]
    ready: dict[int, Batch] = field(default_factory=dict)
    served: dict[str, Any] | None = None

    def arrived(self, batch: Batch) -> None:
        """Take up a batch that has been sampled."""
        self.ready[batch.step] = batch
        last = batch.samples[-1]
        self.served = {"name": last.made_by, "policy_version": last.version}

    def store(self, version: int) -> None:
        """Write the state of this moment into ``extra``."""
        self.extra["policy_version"] = version
        self.extra["served"] = self.served
        self.extra["rollouts"] = [pack(self.ready[step]) for step in sorted(self.ready)]

    def load(self) -> int:
        """Take over what a restore put into ``extra``; returns the policy version."""
        batches = [unpack(packed) for packed in self.extra["rollouts"]]
        self.ready = {batch.step: batch for batch in batches}
        self.served = self.extra["served"]
        return int(self.extra["policy_version"])


class Run:
    """One process's part of a run."""

    def __init__(
        self, config: TrainConfig, engine: ArchonEngine, manager: CheckpointManager
    ) -> None:
        """Put the parts together; nothing is generated or restored yet."""
        self.config = config
        self.engine = engine
        self.manager = manager
        self.prompts = PromptStream()
        self.settings = config.resume_key()
        self.weights = weights_fingerprint(config.model.path)
        self.progress = Progress(
            {
                "rollouts": [],
                "served": None,
                "settings": self.settings,
                "warm_start": None,
                BASE_WEIGHTS: self.weights,
            }
        )
        self.state: TrainState = engine.train_state(
            extra=self.progress.extra, dataloader=self.prompts
        )
        # Its own group: shares are exchanged while checkpoints are agreed upon elsewhere.
        timeout = datetime.timedelta(seconds=config.patience_s)
        self.group = dist.new_group(backend="gloo", timeout=timeout)
        self.probe = build_probe(config, engine)
        self.rollouts = build_rollouts(config, engine, self.group, self.probe)
        self.version = 0
        self.restored: int | None = None

    # -- start ---------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from the newest committed step, if there is one, or begin as the settings say.

        Raises:
            TrainConfigError: a setting differs that the data already sampled depends on, or the
                base's weights do.
        """
        if not self.config.checkpoint.fresh:
            self.restored = resume(self.manager, self.state, reference=self.config.reference)
        if self.restored is None:
            warm = begin(self.manager, self.state, self.config.warm_start)
            self.progress.extra["warm_start"] = warm
            if self.engine.config.reference == "warm-start":
                keep_reference(self.engine)
            return
        any_base = self.config.checkpoint.any_base
        same_base(self.progress.extra, self.weights, any_base=any_base)
        saved = self.progress.extra["settings"]
        for name, value in self.settings.items():
            if saved[name] != value:
                msg = (
                    f"[{name}] differs from the checkpoint's: saved {saved[name]!r}, now "
                    f"{value!r}; put it back, or start over with checkpoint.fresh=true and "
                    "another root"
                )
                raise TrainConfigError(msg)
        self.version = self.progress.load()

    def abandon(self, error: Exception) -> None:
        """After a failure: let commits under way finish, for as long as that may help.

        If the failure is that of a peer, their votes can never be complete, and this gives up.
        """
        try:
            self.manager.wait(_LAST_COMMITS_S)
        except CkptError as problem:
            error.add_note(f"the last save was not committed: {problem}")

    # -- the loop ------------------------------------------------------------------------------

    def train(self, on_record: Told | None = None) -> int | None:
        """Run every step that is left, then wait for the last commit.

        Args:
            on_record: as :func:`run_training` has it.

        Returns:
            None, or the step after which a signal ended it.
        """
        start = 0 if self.restored is None else self.restored + 1
        total = self.config.run.steps
        first = self.engine.rank == 0
        stopped: int | None = None
        if self.rollouts.begin(self.version, self.progress.served):
            self._publish(self.restored)
        start_record = self._start_record(start)
        with ExitStack() as stack:
            shown = first and on_record is None
            display = stack.enter_context(ProgressDisplay(total=total, start=start, enabled=shown))
            writer = None
            if first:
                path = Path(self.config.run.metrics)
                writer = stack.enter_context(MetricsWriter(path, on_record))
                writer.write(start_record)
                display.say(_describe_start(start_record, self.config.checkpoint.root))
            for step in range(start, total):
                record = self.step(step)
                if writer is not None:
                    writer.write(record)
                    display.step(record)
                if step + 1 < total and self.manager.preempted():
                    # Not a try for the next step: its cadence may save nothing for a long time.
                    self.manager.last_save(step, self.state)
                    stopped = step
                    break
            if self.config.checkpoint.wait_mirrored_s and stopped is None:
                self.manager.wait_mirrored(self.config.checkpoint.wait_mirrored_s)
            self.manager.close()
            if writer is not None:
                event = "end" if stopped is None else "preempted"
                writer.write({"event": event, "version": self.version})
        return stopped

    def step(self, step: int) -> dict[str, Any]:
        """Generate ahead, train, save; returns the metrics."""
        began = time.perf_counter()
        self._launch_up_to(step + self.config.ahead)
        waited = self._collect(upto=step)
        stale = self._refuse_stale(step)
        batch = self.progress.ready.pop(step)
        result = train_on(self.engine, batch, self.config, group=self.group)
        staleness = self.version - batch.version
        self.version += 1
        # What is in flight belongs to the state that is saved.
        waited += self._collect(upto=step + self.config.ahead)
        self.progress.store(self.version)
        saved = self._save(step)
        return {
            "step": step,
            "reward": result.reward,
            "loss": result.loss,
            "kl": result.kl,
            "clip_fraction": result.clip_fraction,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "tokens": result.tokens,
            "policy_version": self.version,
            "staleness": staleness,
            "stale": stale,
            "made_by": sorted({sample.made_by for sample in batch.samples}),
            "generate_ms": batch.generate_ms,
            "wait_ms": waited,
            **saved,
            "step_ms": (time.perf_counter() - began) * 1e3,
            "world": self.engine.world_size,
            **self.rollouts.report(),
        }

    def _launch_up_to(self, last: int) -> None:
        """Begin every batch up to ``last`` that is neither here nor under way.

        On the first step that is ``ahead + 1`` batches, all of version 0; later it is one a step.
        """
        known = [*self.progress.ready, *self.rollouts.pending()]
        policy = self.rollouts.policy(self.version)
        for step in range(max(known, default=self.version - 1) + 1, last + 1):
            position = self.prompts.draw(self.config.rollout.prompts_per_step)
            self.rollouts.launch(step, policy, position)

    def _collect(self, *, upto: int) -> float:
        """Wait until all batches up to ``upto`` are whole; milliseconds waited."""
        began = time.perf_counter()
        for step in self.rollouts.pending():
            if step <= upto:
                self.progress.arrived(self.rollouts.take(step))
        return (time.perf_counter() - began) * 1e3

    def _refuse_stale(self, step: int) -> int:
        """Have a batch sampled anew whose samples are too old; how many were.

        Such batches come from a checkpoint of a run that allowed more.
        """
        bound = self.config.rollout.max_staleness
        batch = self.progress.ready[step]
        stale = batch.stale(self.version, bound)
        if stale:
            del self.progress.ready[step]
            self.rollouts.launch(step, self.rollouts.policy(self.version), batch.first)
            self._collect(upto=step)
        return stale

    def _save(self, step: int) -> dict[str, Any]:
        """Save where the cadence says so, publish where it or a sampler does; metrics of it."""
        section = self.config.checkpoint
        done = step + 1
        last = done == self.config.run.steps
        saves = last or done % section.save_every == 0
        wanted = self.rollouts.wants(self.version) and not last
        due = bool(section.publish_every) and (done % section.publish_every == 0 or last)
        publish = wanted or (saves and due)
        if last and section.when_busy == "skip":
            self.manager.wait()  # the last step is never left out
        probe, probe_ms = self._record() if publish else (None, 0.0)
        began = time.perf_counter()
        # What fails in the background is raised by the next save(), or by close().
        if saves:
            handle = self.manager.save(step, self.state, publish=publish, probe=probe)
        elif publish:
            handle = self.manager.publish(self.state, step=step, probe=probe)
        else:
            return {"stall_ms": 0.0, "probe_ms": 0.0, "published": False}
        stall_ms = (time.perf_counter() - began) * 1e3
        if wanted:
            self.rollouts.published(self.version, handle)
        return {
            "stall_ms": stall_ms,
            "probe_ms": probe_ms,
            "published": publish and not handle.skipped,
        }

    def _record(self) -> tuple[dict[str, Any] | None, float]:
        """What an engine with the present adapter must answer, and the milliseconds it took."""
        if self.probe is None:
            return None, 0.0
        began = time.perf_counter()
        probe = self.probe.record()
        return probe, (time.perf_counter() - began) * 1e3

    def _publish(self, step: int | None) -> None:
        """Publish the version that samplers wait for, outside of the cadence."""
        probe, _ = self._record()
        handle = self.manager.publish(self.state, step=step, probe=probe)
        self.rollouts.published(self.version, handle)

    def _start_record(self, start: int) -> dict[str, Any]:
        """Who runs, and from where; collective."""
        pids = gather_json(self.group, os.getpid(), timeout=self.config.run.timeout_s)
        return {
            "event": "start",
            "step_from": start,
            "restored": self.restored,
            "world": self.engine.world_size,
            "pids": pids,
            "in_flight": sorted(self.progress.ready),
            "version": self.version,
            "warm_start": self.progress.extra.get("warm_start"),
        }


def _describe_start(record: Mapping[str, Any], root: str) -> str:
    ranks = f"{record['world']} rank{'s' if record['world'] > 1 else ''}"
    if record["restored"] is None:
        warm = record["warm_start"]
        source = "" if warm is None else f" with the adapter of {warm['url']}"
        return f"starting on {ranks}{source}; checkpoints go to {root}"
    return (
        f"resuming on {ranks} after step {record['restored']} of {root}, policy version "
        f"{record['version']}; batches in flight {record['in_flight']}, split over the ranks anew"
    )
