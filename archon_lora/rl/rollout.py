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
from archon_lora.rl.task import Question, Task

LOCAL = "local"
"""What samples of the trainer's own devices say they were made by."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt with its completion and reward.

    Attributes:
        index: number of the sample in the batch, over all ranks.
        prompt: token ids.
        completion: token ids and behaviour log-probabilities.
        reward: the task's verdict.
        version: the policy that made it, as a number of optimizer steps.
        made_by: name of the published version that an engine served, ``base`` for an engine's
            model without an adapter, or ``local``.
    """

    index: int
    prompt: tuple[int, ...]
    completion: Completion
    reward: float
    version: int
    made_by: str = LOCAL


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of one step, or a rank's share of them, by index.

    Attributes:
        step: the optimizer step that trains on them.
        first: position of the first prompt, which they can be sampled anew from.
        samples: in order of their index; the completions of one prompt lie side by side.
        generate_ms: what this rank's share took.
    """

    step: int
    first: int
    samples: tuple[Sample, ...]
    generate_ms: float = 0.0

    @property
    def version(self) -> int:
        """The oldest policy that sampled any of them."""
        return min(sample.version for sample in self.samples)

    def stale(self, version: int, bound: int) -> int:
        """How many samples are more than ``bound`` versions older than ``version``."""
        return sum(version - sample.version > bound for sample in self.samples)


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


def judge(
    task: Task,
    tokenizer: Tokenizer,
    question: Question,
    *,
    index: int,
    prompt: tuple[int, ...],
    completion: Completion,
    version: int,
    made_by: str = LOCAL,
) -> Sample:
    """A sample, with the task's verdict; arguments as the attributes of :class:`Sample`."""
    text = tokenizer.decode(list(completion.tokens))
    return Sample(
        index=index,
        prompt=prompt,
        completion=completion,
        reward=task.reward(question, text),
        version=version,
        made_by=made_by,
    )


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
        samples = tuple(
            judge(
                self.task,
                self.tokenizer,
                question,
                index=index,
                prompt=tuple(prompt),
                completion=completion,
                version=version,
            )
            for index, prompt, completion, question in zip(
                self.indices, prompts, completions, questions, strict=True
            )
        )
        elapsed = (time.perf_counter() - began) * 1e3
        return Batch(step=step, first=first, samples=samples, generate_ms=elapsed)


class RolloutQueue:
    """Batches, or shares of them, in the making, in order, by one worker thread."""

    def __init__(self, *, max_staleness: int, timeout: float, closing: float | None = None) -> None:
        """Start the worker.

        Args:
            max_staleness: steps by which a batch's policy may lag behind the trainer's.
            timeout: seconds that :meth:`take` waits.
            closing: seconds that :meth:`close` waits; ``timeout`` if None.
        """
        self._max_staleness = max_staleness
        self._timeout = timeout
        self._closing = timeout if closing is None else closing
        self._pending: dict[int, Future[Batch]] = {}
        # One worker: a policy holds one adapter at a time, and order keeps memory bounded.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")

    def launch(self, step: int, version: int, make: Callable[[], Batch]) -> None:
        """Begin what this rank makes of the batch for ``step``.

        Args:
            step: the optimizer step that will train on it.
            version: which policy samples it.
            make: called on the worker alone.

        Raises:
            ValueError: it would be staler than allowed by the time it is trained on.
        """
        if not 0 <= step - version <= self._max_staleness:
            msg = (
                f"batch {step} sampled by version {version} would be {step - version} steps stale; "
                f"max_staleness is {self._max_staleness}"
            )
            raise ValueError(msg)
        self._pending[step] = self._worker.submit(make)

    def pending(self) -> list[int]:
        """Steps whose batches were launched and not taken."""
        return sorted(self._pending)

    def take(self, step: int) -> Batch:
        """Wait for what this rank makes of ``step`` and hand it out.

        Raises:
            TimeoutError: it was not ready in time.
        """
        made = self._pending[step]
        wait([made], timeout=self._timeout)
        if not made.done():
            msg = (
                f"this rank's share of batch {step} was not sampled within {self._timeout:g} s; "
                "raise run.timeout_s (with an engine: engine.batch_timeout_s), or lower "
                "rollout.max_new_tokens or prompts_per_step"
            )
            raise TimeoutError(msg)
        del self._pending[step]
        return made.result()

    def close(self) -> None:
        """Drop what has not begun and wait, not for ever, for what has."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        begun = [made for made in self._pending.values() if not made.cancelled()]
        wait(begun, timeout=self._closing)


def merge(shares: Sequence[Batch]) -> Batch:
    """One whole batch from every rank's share.

    Raises:
        ValueError: the shares are of different batches, or do not make up a whole one.
    """
    samples = sorted((s for part in shares for s in part.samples), key=lambda s: s.index)
    same = {(part.step, part.first) for part in shares}
    if len(same) != 1 or [s.index for s in samples] != list(range(len(samples))):
        msg = f"shares do not make up one batch: {same}, samples {[s.index for s in samples]}"
        raise ValueError(msg)
    return Batch(
        step=shares[0].step,
        first=shares[0].first,
        samples=tuple(samples),
        generate_ms=max(part.generate_ms for part in shares),
    )


def pack(batch: Batch) -> dict[str, Any]:
    """A batch as JSON values; floats keep every bit."""
    return {
        "step": batch.step,
        "first": batch.first,
        "generate_ms": batch.generate_ms,
        "samples": [
            {
                "index": s.index,
                "prompt": list(s.prompt),
                "tokens": list(s.completion.tokens),
                "logprobs": list(s.completion.logprobs),
                "reward": s.reward,
                "version": s.version,
                "made_by": s.made_by,
            }
            for s in batch.samples
        ],
    }


def unpack(packed: Mapping[str, Any]) -> Batch:
    """The reverse of :func:`pack`."""
    return Batch(
        step=packed["step"],
        first=packed["first"],
        generate_ms=packed["generate_ms"],
        samples=tuple(
            Sample(
                index=entry["index"],
                prompt=tuple(entry["prompt"]),
                completion=Completion(
                    tokens=tuple(entry["tokens"]), logprobs=tuple(entry["logprobs"])
                ),
                reward=entry["reward"],
                version=entry["version"],
                made_by=entry["made_by"],
            )
            for entry in packed["samples"]
        ),
    )
