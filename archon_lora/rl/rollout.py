"""Rollouts one or more steps ahead of the trainer, in a thread of their own.

Which policy version samples which batch follows from step numbers alone: the batch for step
``t`` comes from version ``max(0, t - max_staleness)``, where version ``v`` is the adapter after
``v`` optimizer steps. So the loop is asynchronous in time and still gives the same run each time.

Batches that were sampled but not yet trained on belong to the run's state: the adapters that
made them are gone, so a resumed run could not make them again. Every rank makes a share of a
batch; the shares are exchanged, so that the state holds whole batches and any number of ranks can
go on from it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from archon_lora.rl.config import RolloutSection
from archon_lora.rl.sampling import Completion, LocalPolicy, sample_seed
from archon_lora.rl.task import Task


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its completion and reward.

    Attributes:
        index: number of the sample in the batch, over all ranks.
        prompt: token ids.
        completion: token ids and behaviour log-probabilities.
        reward: the task's verdict.
    """

    index: int
    prompt: tuple[int, ...]
    completion: Completion
    reward: float


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one step, or a rank's share of them, by index.

    Attributes:
        step: the optimizer step that trains on them.
        version: the policy that sampled them, as a number of optimizer steps.
        samples: in order of their index; the completions of one prompt lie side by side.
        generate_ms: what this rank's share took.
    """

    step: int
    version: int
    samples: tuple[Sample, ...]
    generate_ms: float = 0.0


class PromptStream:
    """The position in the task's endless list of prompts; the same on every rank."""

    def __init__(self) -> None:
        self._position = 0

    def draw(self, count: int) -> int:
        """Move on by ``count`` prompts; the position of the first one."""
        first = self._position
        self._position += count
        return first

    def state_dict(self) -> dict[str, int]:
        """The position."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int], /) -> None:
        """Go on from a saved position."""
        self._position = state["position"]


def share(total: int, rank: int, world: int) -> range:
    """Sample numbers of one rank: contiguous, and sizes differ by at most one."""
    return range(total * rank // world, total * (rank + 1) // world)


@dataclass(frozen=True, slots=True)
class SampleMaker:
    """Makes this rank's share of a batch: a pure function of what it is given."""

    policy: LocalPolicy
    tokenizer: Tokenizer
    task: Task
    section: RolloutSection
    seed: int
    indices: range

    def make(self, step: int, version: int, first: int, adapter: Mapping[str, Tensor]) -> Batch:
        """Sample the share of one batch.

        Args:
            step: the step that will train on it.
            version: which policy the adapter is.
            first: position of the batch's first prompt.
            adapter: canonical FQN to full tensor.
        """
        began = time.perf_counter()
        self.policy.load_adapter(adapter)
        questions = [
            self.task.question(first + index // self.section.group_size) for index in self.indices
        ]
        prompts = [self.tokenizer.encode(q.prompt, add_special_tokens=False).ids for q in questions]
        seeds = [sample_seed(self.seed, step, index) for index in self.indices]
        completions = self.policy.complete(prompts, seeds)
        texts = [self.tokenizer.decode(list(c.tokens)) for c in completions]
        samples = tuple(
            Sample(
                index=index,
                prompt=tuple(prompt),
                completion=completion,
                reward=self.task.reward(question, text),
            )
            for index, prompt, completion, question, text in zip(
                self.indices, prompts, completions, questions, texts, strict=True
            )
        )
        elapsed = (time.perf_counter() - began) * 1e3
        return Batch(step=step, version=version, samples=samples, generate_ms=elapsed)


Make = Callable[[int, int, int, Mapping[str, Tensor]], Batch]
"""Samples a share: (step, version, first prompt, adapter) to a batch."""


class RolloutQueue:
    """Shares in the making, in order, by one worker thread."""

    def __init__(self, make: Make, *, max_staleness: int, timeout: float) -> None:
        """Start the worker.

        Args:
            make: called on the worker alone.
            max_staleness: steps by which a batch's policy may lag behind the trainer's.
            timeout: seconds that :meth:`take` and :meth:`close` wait.
        """
        self._make = make
        self._max_staleness = max_staleness
        self._timeout = timeout
        self._pending: dict[int, Future[Batch]] = {}
        # One worker: the policy holds one adapter at a time, and order keeps memory bounded.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")

    def launch(self, step: int, version: int, first: int, adapter: Mapping[str, Tensor]) -> None:
        """Begin this rank's share of the batch for ``step``.

        Raises:
            ValueError: it would be staler than allowed by the time it is trained on.
        """
        if not 0 <= step - version <= self._max_staleness:
            msg = (
                f"batch {step} sampled by version {version} would be {step - version} steps stale; "
                f"max_staleness is {self._max_staleness}"
            )
            raise ValueError(msg)
        self._pending[step] = self._worker.submit(self._make, step, version, first, adapter)

    def pending(self) -> list[int]:
        """Steps whose shares were launched and not taken."""
        return sorted(self._pending)

    def take(self, step: int) -> Batch:
        """Wait for the share of ``step`` and hand it out.

        Raises:
            TimeoutError: it was not ready in time.
        """
        made = self._pending[step]
        wait([made], timeout=self._timeout)
        if not made.done():
            msg = (
                f"this rank's share of batch {step} was not sampled within {self._timeout:g} s; "
                "raise run.timeout_s, or lower rollout.max_new_tokens or prompts_per_step"
            )
            raise TimeoutError(msg)
        del self._pending[step]
        return made.result()

    def close(self) -> None:
        """Drop what has not begun and wait, not for ever, for what has."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        begun = [made for made in self._pending.values() if not made.cancelled()]
        wait(begun, timeout=self._timeout)


def merge(shares: Sequence[Batch]) -> Batch:
    """One whole batch from every rank's share.

    Raises:
        ValueError: the shares are of different batches, or do not make up a whole one.
    """
    samples = sorted((s for part in shares for s in part.samples), key=lambda s: s.index)
    same = {(part.step, part.version) for part in shares}
    if len(same) != 1 or [s.index for s in samples] != list(range(len(samples))):
        msg = f"shares do not make up one batch: {same}, samples {[s.index for s in samples]}"
        raise ValueError(msg)
    return Batch(
        step=shares[0].step,
        version=shares[0].version,
        samples=tuple(samples),
        generate_ms=max(part.generate_ms for part in shares),
    )


def pack(batch: Batch) -> dict[str, Any]:
    """A batch as JSON values; floats keep every bit."""
    return {
        "step": batch.step,
        "version": batch.version,
        "generate_ms": batch.generate_ms,
        "samples": [
            {
                "index": s.index,
                "prompt": list(s.prompt),
                "tokens": list(s.completion.tokens),
                "logprobs": list(s.completion.logprobs),
                "reward": s.reward,
            }
            for s in batch.samples
        ],
    }


def unpack(packed: Mapping[str, Any]) -> Batch:
    """The reverse of :func:`pack`."""
    return Batch(
        step=packed["step"],
        version=packed["version"],
        generate_ms=packed["generate_ms"],
        samples=tuple(
            Sample(
                index=entry["index"],
                prompt=tuple(entry["prompt"]),
                completion=Completion(
                    tokens=tuple(entry["tokens"]), logprobs=tuple(entry["logprobs"])
                ),
                reward=entry["reward"],
            )
            for entry in packed["samples"]
        ),
    )
