"""The replicas of an inference engine as samplers: the first rank's part of engine rollouts.

A batch counts only if every one of its samples is shown to be of the version that was asked for:

- before: the replica has proven the version by the probe that the trainer recorded
  (:mod:`ckpt.handoff.handover`), under a name and path that no other version ever had;
- in every answer: the name of the version, the prompt, the number of completions;
- after: the replica still lists the version and was not restarted meanwhile, and the trainer's own
  copy of the version gives the samples that it looks at the log-probabilities that the replica
  reported.

What fails is asked for again, of replicas that were brought back to the version, within bounds.
"""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from archon_lora.rl.config import EngineSection, RolloutSection
from archon_lora.rl.rollout import Batch, Sample, judge
from archon_lora.rl.sampling import Completion, sample_seed
from archon_lora.rl.scorer import Scorer
from archon_lora.rl.task import Question, Task
from ckpt import CkptError, SaveHandle
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.engine import EngineError
from ckpt.handoff.generate import Generated, Generator, Sampling
from ckpt.handoff.handover import Handover
from ckpt.handoff.registry import Registry, Version
from ckpt.handoff.report import HandoverReport
from ckpt.peft import read_adapter

_FETCH_LEASE_S = 600.0
_LOOK_S = 1.0
_PAUSE_S = 0.5
"""Before a batch is tried again; doubled each time."""

log = logging.getLogger(__name__)


class RolloutsFailed(CkptError, RuntimeError):
    """No replica gave samples that are shown to be of the right version, however often asked."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One prompt of a batch, and whose completions of it are wanted.

    Attributes:
        group: its number in the batch.
        question: the task's.
        prompt: its token ids.
        seed: of its first completion.
    """

    group: int
    question: Question
    prompt: tuple[int, ...]
    seed: int


@dataclass(slots=True)
class Tally:
    """What became of the requests since it was last read.

    Attributes:
        replicas: how many served the batch last made.
        handover_ms: time of hand-overs and of bringing replicas back.
        rounds: how often batches were tried.
        failed_requests: requests that replicas did not answer as they should.
        refused: samples that were not shown to be of the right version, and dropped.
    """

    replicas: int = 0
    handover_ms: float = 0.0
    rounds: int = 0
    failed_requests: int = 0
    refused: int = 0

    def read(self) -> dict[str, Any]:
        """The values as metrics; counts begin anew."""
        found = {
            "replicas": self.replicas,
            "handover_ms": self.handover_ms,
            "rounds": self.rounds,
            "failed_requests": self.failed_requests,
            "refused": self.refused,
        }
        self.handover_ms, self.rounds, self.failed_requests, self.refused = 0.0, 0, 0, 0
        return found


@dataclass(slots=True)
class Fleet:
    """Replicas, how versions reach them, and how what they give is checked.

    Attributes:
        engines: the replicas.
        handover: makes versions live on them.
        registry: where versions are published.
        cache: where replicas read them.
        scorer: the trainer's own copy of what is served.
        tokenizer: of the model.
        task: asks and judges.
        rollout: how completions are sampled.
        section: bounds.
        stop_ids: token ids that end a completion.
        seed: of the run.
        tally: what became of the requests.
    """

    engines: Sequence[Generator]
    handover: Handover
    registry: Registry
    cache: VersionCache
    scorer: Scorer
    tokenizer: Tokenizer
    task: Task
    rollout: RolloutSection
    section: EngineSection
    stop_ids: tuple[int, ...]
    seed: int
    tally: Tally = field(default_factory=Tally)
    _holder: str = field(default_factory=lambda: f"trainer-{uuid.uuid4().hex[:12]}")
    _coming: dict[int, Callable[[], Version]] = field(default_factory=dict)

    def ready(self) -> None:
        """Wait until enough replicas answer.

        Raises:
            EngineError: too few do in time; the error of one that does not.
        """
        timeout = self.section.ready_timeout_s

        def listed(engine: Generator) -> set[str] | EngineError:
            try:
                engine.ready(timeout)
                return set(engine.adapters())
            except EngineError as error:
                return error

        with ThreadPoolExecutor(len(self.engines), "rollout-ready") as pool:
            answers = list(pool.map(listed, self.engines))
        errors = [answer for answer in answers if isinstance(answer, EngineError)]
        # What an earlier process left in the cache may go, except where a replica may read it.
        self.cache.use(set().union(*(a for a in answers if not isinstance(a, EngineError))))
        if len(self.engines) - len(errors) < self.section.quorum:
            raise errors[0]
        for error in errors:
            log.warning("going on without a replica until it comes back: %s", error)

    def published(self, policy: int, handle: SaveHandle) -> None:
        """A version of the policy is on its way to storage."""

        def version() -> Version:
            manifest = handle.published.result(self.section.batch_timeout_s)
            if manifest is None:
                msg = f"policy version {policy} was left out by when_busy and cannot be sampled"
                raise RolloutsFailed(msg)
            return self.registry.get(manifest.name)

        self._coming = {policy: version}

    def adopt(self, policy: int, name: str) -> bool:
        """Go on with a version that an earlier process published; whether it is there."""
        try:
            version = self.registry.get(name)
        except (CkptError, ValueError) as error:
            log.warning("cannot go on sampling with %s: %s", name, error)
            return False
        if version.policy_version != policy or version.probe is None:
            log.warning("%s is of policy version %s; want %d", name, version.policy_version, policy)
            return False
        self._coming = {policy: lambda: version}
        return True

    def make(self, step: int, policy: int, first: int) -> Batch:
        """Sample a whole batch.

        Args:
            step: the step that will train on it.
            policy: the version to sample.
            first: position of the batch's first prompt.

        Raises:
            RolloutsFailed: not within the bounds; says what each replica did.
            CkptError: the version cannot be had.
        """
        began = time.perf_counter()
        version = self._coming[policy]()
        left = self._asks(step, first)
        done: dict[int, list[Generated]] = {}
        reasons: list[str] = []
        suspects: set[str] = set()
        replicas: list[Generator] = []
        for attempt in range(self.section.attempts):
            if attempt:
                time.sleep(_PAUSE_S * 2 ** (attempt - 1))
                if not replicas:
                    self._await_any(began + self.section.batch_timeout_s)
            self.tally.rounds += 1
            reasons = []
            replicas = self._serving(version, reasons)
            trusted = [engine for engine in replicas if engine.url not in suspects] or replicas
            done |= self._round(version, trusted, left, reasons, suspects)
            left = [ask for ask in left if ask.group not in done]
            if not left:
                break
            log.warning("batch %d, try %d: %s", step, attempt + 1, "; ".join(reasons))
        if left:
            msg = (
                f"{version.name}: {len(left)} prompts of batch {step} have no samples that are "
                f"shown to be of this version, after {self.section.attempts} tries; "
                f"{'; '.join(reasons)}"
            )
            raise RolloutsFailed(msg)
        elapsed = (time.perf_counter() - began) * 1e3
        return Batch(step, first, self._samples(step, policy, version, first, done), elapsed)

    def close(self) -> None:
        """Let go of replicas, cache and store; what is loaded stays loaded."""
        for engine in self.engines:
            engine.close()
        self.cache.close()
        self.registry.close()

    def _await_any(self, deadline: float) -> None:
        """Give replicas the time that a start takes; returns once one answers, or too late."""
        until = min(deadline, time.perf_counter() + self.section.ready_timeout_s)
        while time.perf_counter() < until:
            for engine in self.engines:
                with contextlib.suppress(EngineError):
                    engine.ready(_LOOK_S)
                    return

    def _asks(self, step: int, first: int) -> list[Ask]:
        size = self.rollout.group_size
        asks = []
        for group in range(self.rollout.prompts_per_step):
            question = self.task.question(first + group)
            ids = self.tokenizer.encode(question.prompt, add_special_tokens=False).ids
            asks.append(
                Ask(group, question, tuple(ids), sample_seed(self.seed, step, group * size))
            )
        return asks

    def _serving(self, version: Version, reasons: list[str]) -> list[Generator]:
        """Bring the version live where it is not; the replicas that have proven it."""
        began = time.perf_counter()
        current = self.handover.current
        if current is None or current.name != version.name:
            self.registry.lease(version, self._holder, _FETCH_LEASE_S)
            try:
                directory = self.cache.get(self.registry, version)
            finally:
                self.registry.release(version, self._holder)
            report: HandoverReport | None = self.handover.make_live(version, directory)
            if self.handover.current == version:
                self.handover.unload_unused()
            self.cache.use(self.handover.in_use)
        else:
            report = self.handover.restore_missing()
        self.tally.handover_ms += (time.perf_counter() - began) * 1e3
        if report is not None:
            reasons += [f"{item.reason or item.state}" for item in report.failures]
        live = self.handover.current
        proven = self.handover.serving if live is not None and live.name == version.name else ()
        self.tally.replicas = len(proven)
        return [engine for engine in self.engines if engine.url in proven]

    def _round(
        self,
        version: Version,
        replicas: list[Generator],
        asks: list[Ask],
        reasons: list[str],
        suspects: set[str],
    ) -> dict[int, list[Generated]]:
        """Ask once for everything that is left; what was shown to be right, by group.

        Replicas that failed are added to ``suspects``, and why to ``reasons``.
        """
        if not replicas:
            return {}
        lanes = len(replicas)
        with ThreadPoolExecutor(lanes * self.section.parallel, "rollout-ask") as pool:
            shares = {
                engine.url: [(ask, pool.submit(self._ask, engine, version, ask)) for ask in mine]
                for engine, mine in ((e, asks[i::lanes]) for i, e in enumerate(replicas))
            }
        good: dict[str, dict[int, list[Generated]]] = {}
        for url, futures in shares.items():
            good[url] = {}
            for ask, future in futures:
                try:
                    good[url][ask.group] = future.result()
                except EngineError as error:
                    self.tally.failed_requests += 1
                    suspects.add(url)
                    reasons.append(str(error))
        # A replica that was restarted, or dropped the version, in between is brought back by this.
        began = time.perf_counter()
        report = self.handover.restore_missing()
        self.tally.handover_ms += (time.perf_counter() - began) * 1e3
        astray = {} if report is None else {item.url: item for item in report.replicas}
        by_group = {ask.group: ask for ask in asks}
        kept: dict[int, list[Generated]] = {}
        for url, found in good.items():
            if found and url in astray:
                problem: str | None = (
                    f"{url}: {version.name} was lost while it was sampled (a restart?)"
                )
            else:
                problem = self._doubt(version, url, [(by_group[g], c) for g, c in found.items()])
            if problem is None:
                kept |= found
            else:
                self.tally.refused += sum(map(len, found.values()))
                suspects.add(url)
                reasons.append(problem)
        return kept

    def _ask(self, engine: Generator, version: Version, ask: Ask) -> list[Generated]:
        sampling = Sampling(
            n=self.rollout.group_size,
            max_tokens=self.rollout.max_new_tokens,
            temperature=self.rollout.temperature,
            seed=ask.seed,
            stop_token_ids=self.stop_ids,
        )
        return engine.generate(ask.prompt, version.name, sampling)

    def _doubt(
        self, version: Version, url: str, found: list[tuple[Ask, list[Generated]]]
    ) -> str | None:
        """Compute some samples of a replica again; what speaks against them, or None.

        Raises:
            EngineError: they are right but for the temperature, which no repetition mends.
        """
        picked = [(ask, each) for ask, several in found for each in several[:1]]
        picked = picked[: self.section.check_samples]
        if not picked:
            return None
        if self.scorer.loaded != version.name:
            config, tensors = read_adapter(self.cache.path(version.name))
            self.scorer.load(version.name, config, tensors)
        off = max(self._off(ask, each, self.rollout.temperature) for ask, each in picked)
        bound = self.section.tolerance
        if off <= bound:
            return None
        if self.rollout.temperature != 1.0:
            plain = max(self._off(ask, each, 1.0) for ask, each in picked)
            if plain <= bound:
                temperature = f"temperature {self.rollout.temperature:g}"
                answer = "log-probabilities at temperature 1, not of what it samples from"
                remedy = "start vLLM with --logprobs-mode processed_logprobs"
                raise EngineError(url, f"sample at {temperature}", answer, remedy)
        return (
            f"{url}: its samples are not of {version.name}: its log-probabilities are {off:.3g} "
            f"nats a token off the trainer's own (engine.tolerance is {bound:g})"
        )

    def _off(self, ask: Ask, each: Generated, temperature: float) -> float:
        """Mean distance of a completion's log-probabilities from the trainer's own."""
        own = self.scorer.logprobs([*ask.prompt, *each.token_ids], temperature=temperature)
        pairs = zip(own[len(ask.prompt) - 1 :], each.logprobs, strict=True)
        return sum(abs(a - b) for a, b in pairs) / len(each.logprobs)

    def _samples(
        self, step: int, policy: int, version: Version, first: int, done: dict[int, list[Generated]]
    ) -> tuple[Sample, ...]:
        """The samples of a batch, judged, in order."""
        size = self.rollout.group_size
        return tuple(
            judge(
                self.task,
                self.tokenizer,
                ask.question,
                index=ask.group * size + number,
                prompt=ask.prompt,
                completion=Completion(tokens=each.token_ids, logprobs=each.logprobs),
                version=policy,
                made_by=version.name,
            )
            for ask in self._asks(step, first)
            for number, each in enumerate(done[ask.group])
        )
