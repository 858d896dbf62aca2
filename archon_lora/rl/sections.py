"""The sections of a training run's settings: one frozen dataclass each.

They are documented key by key in ``docs/main-job.md``; :mod:`archon_lora.rl.config` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from archon_lora.errors import TrainConfigError


def need(section: str, *, key: str, value: object, ok: bool, wanted: str) -> None:
    """Raise :class:`TrainConfigError` naming ``section.key`` unless ``ok``."""
    if not ok:
        msg = f"{section}.{key} must be {wanted}, got {value!r}"
        raise TrainConfigError(msg)


def positive(section: str, obj: object, *keys: str) -> None:
    """Each of ``keys`` must be at least 1."""
    for key in keys:
        value = getattr(obj, key)
        need(section, key=key, value=value, ok=value >= 1, wanted="at least 1")


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """The run as a whole.

    Attributes:
        name: prefix of published version names.
        steps: optimizer steps in total; a resumed run goes on up to this number.
        seed: seeds the adapter's first values and every sampling generator.
        threads: intra-op threads a rank may use; 1 keeps sums in one order.
        metrics: JSON-lines file that rank 0 appends to.
        timeout_s: deadline in seconds of every collective of the training group.
    """

    name: str = "run"
    steps: int = 40
    seed: int = 0
    threads: int = 1
    metrics: str = "metrics.jsonl"
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        positive("run", self, "steps", "threads")
        need("run", key="seed", value=self.seed, ok=self.seed >= 0, wanted="at least 0")
        need("run", key="timeout_s", value=self.timeout_s, ok=self.timeout_s > 0, wanted="> 0")
        need("run", key="metrics", value=self.metrics, ok=bool(self.metrics), wanted="a path")


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """The frozen base.

    Attributes:
        path: a HuggingFace model directory with ``tokenizer.json``.
        name: what published adapters call the base; empty for the path as given.
        dtype: of the base's weights, ``float32`` or ``bfloat16``; adapters stay fp32.
        device: ``cpu``, ``cuda``, or ``auto`` (CUDA where there is a device).
    """

    path: str
    name: str = ""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class LoRASection:
    """The adapter; values are checked once more, in depth, by ``LoRAConfig``."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    use_rslora: bool = False


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """AdamW over the adapter, and the learning rate's course.

    Attributes:
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        grad_clip: largest gradient norm.
        warmup_steps: steps over which the rate rises linearly.
        schedule: afterwards ``constant``, or a ``linear`` or ``cosine`` decay to 0 at
            ``run.steps``.
        micro_batches: parts that a rank's rows are split into, to save memory.
    """

    lr: float = 2e-2
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    micro_batches: int = 1

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        need("optimizer", key="lr", value=self.lr, ok=self.lr > 0, wanted="> 0")
        need(
            "optimizer",
            key="betas",
            value=self.betas,
            ok=len(self.betas) == 2,
            wanted="two numbers",
        )
        need(
            "optimizer",
            key="warmup_steps",
            value=self.warmup_steps,
            ok=self.warmup_steps >= 0,
            wanted="at least 0",
        )


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """What is asked and how an answer is checked.

    Attributes:
        name: ``"kinds"`` (write characters of the kind that the prompt names) or
            ``"addition"`` (write the sum of two numbers).
        kinds: the kinds asked for in turn (``kinds`` only).
        length: number of characters asked for (``kinds`` only).
        digits: digits of each summand (``addition`` only).
    """

    name: Literal["kinds", "addition"] = "kinds"
    kinds: tuple[str, ...] = ("digits", "lower")
    length: int = 12
    digits: int = 1

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`); kinds are checked by the task itself."""
        positive("task", self, "length", "digits")


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """How completions are sampled.

    Attributes:
        source: ``local`` samples on the trainer's own devices; ``vllm`` and ``sglang`` have the
            replicas of ``[engine]`` do it.
        prompts_per_step: prompts in a batch, over all ranks.
        group_size: completions per prompt; advantages are normalised within the group.
        max_new_tokens: longest completion in tokens.
        temperature: divides the logits, for sampling and for every log-probability.
        max_staleness: optimizer steps by which the sampling policy may lag; 0 is synchronous. What
            is older is not trained on but sampled anew.
    """

    source: Literal["local", "vllm", "sglang"] = "local"
    prompts_per_step: int = 4
    group_size: int = 8
    max_new_tokens: int = 12
    temperature: float = 1.0
    max_staleness: int = 1

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        positive("rollout", self, "prompts_per_step", "max_new_tokens")
        need(
            "rollout",
            key="group_size",
            value=self.group_size,
            ok=self.group_size >= 2,
            wanted="at least 2 (advantages are relative to the group)",
        )
        need(
            "rollout",
            key="temperature",
            value=self.temperature,
            ok=self.temperature > 0,
            wanted="> 0",
        )
        need(
            "rollout",
            key="max_staleness",
            value=self.max_staleness,
            ok=self.max_staleness >= 0,
            wanted="at least 0",
        )

    @property
    def samples(self) -> int:
        """Completions in a batch, over all ranks."""
        return self.prompts_per_step * self.group_size


@dataclass(frozen=True, kw_only=True)
class EngineSection:
    """The inference engine that samples, where ``rollout.source`` names one.

    Attributes:
        urls: its replicas, each ``http://host:port``.
        dtype: in which the replicas compute; what they are expected to answer is computed in it.
        handover_every: a version is handed over every so many optimizer steps.
        tolerance: how far a replica's log-probabilities may be off, per token, in nats.
        check_samples: samples of each replica and batch that the trainer computes again; 0 relies
            on the probe alone.
        quorum: replicas that must serve a version; the others are brought back when they can be.
        slots: adapters that a replica holds at once.
        attempts: how often a batch is tried before the run ends.
        request_timeout_s: longest time in seconds for one answer.
        batch_timeout_s: longest time in seconds for a batch, hand-over and all attempts included.
        ready_timeout_s: how long a replica may take to start, in seconds: at the beginning, and
            before a batch is tried again that found none.
        cache: directory for the versions that replicas load, as they see it too; empty for
            ``adapters`` beside the metrics file.
        parallel: requests under way at once, per replica.
    """

    urls: tuple[str, ...] = ()
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    handover_every: int = 1
    tolerance: float = 0.05
    check_samples: int = 1
    quorum: int = 1
    slots: int = 2
    attempts: int = 3
    request_timeout_s: float = 120.0
    batch_timeout_s: float = 600.0
    ready_timeout_s: float = 120.0
    cache: str = ""
    parallel: int = 8

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        positive("engine", self, "handover_every", "attempts", "parallel", "quorum")
        need("engine", key="slots", value=self.slots, ok=self.slots >= 2, wanted="at least 2")
        for key in ("tolerance", "request_timeout_s", "batch_timeout_s", "ready_timeout_s"):
            value = getattr(self, key)
            need("engine", key=key, value=value, ok=0 < value < math.inf, wanted="> 0")
        need(
            "engine",
            key="check_samples",
            value=self.check_samples,
            ok=self.check_samples >= 0,
            wanted="at least 0",
        )
        need(
            "engine",
            key="urls",
            value=self.urls,
            ok=len(set(self.urls)) == len(self.urls),
            wanted="different addresses",
        )


@dataclass(frozen=True, kw_only=True)
class GRPOSection:
    """The loss.

    Attributes:
        clip: half-width of the interval that the policy ratio is clipped to.
        kl_coef: weight of the KL estimate against the reference.
        reference: what the policy is to stay near to: the frozen ``base``, or the adapter of the
            ``warm-start`` as it was then; ``auto`` is that adapter where ``warm_start.url`` names
            one, else the base.
        advantage_eps: added to a group's standard deviation.
    """

    clip: float = 0.2
    kl_coef: float = 0.01
    reference: Literal["auto", "base", "warm-start"] = "auto"
    advantage_eps: float = 1e-4

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        need("grpo", key="clip", value=self.clip, ok=0 < self.clip < 1, wanted="between 0 and 1")
        need("grpo", key="kl_coef", value=self.kl_coef, ok=self.kl_coef >= 0, wanted="at least 0")
        need(
            "grpo",
            key="advantage_eps",
            value=self.advantage_eps,
            ok=self.advantage_eps > 0,
            wanted="> 0",
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Where and how often the run is saved.

    Attributes:
        root: directory or fsspec URL (``s3://bucket/run``) of this run.
        save_every: a resumable step every so many optimizer steps.
        publish_every: a PEFT version every so many optimizer steps; 0 publishes none.
        publish_dtype: dtype of published adapters.
        keep_latest: newest steps kept.
        keep_every: steps whose number is a multiple of this are kept too; 0 keeps no such steps.
        keep_versions: newest versions kept; 0 keeps all.
        storage_options: passed to fsspec, a table of its own; credentials are better left to
            the environment.
        vote_timeout_s: deadline in seconds for the ranks' agreement on a commit.
        preempt_deadline_s: seconds from a SIGTERM by which the last save must be committed.
        fresh: start over although the root holds steps.
        any_base: go on although the base's weights are not those that the run began with.
        local_tier: a local directory (a disk, or ``/dev/shm``) in which steps commit and from
            which a process of its own brings them to ``root``; empty for none.
        wait_mirrored_s: seconds that the end of the run waits for the root to hold what the local
            tier holds; 0 leaves that to the process that mirrors.
        when_busy: what a save does while two are under way: ``block``, ``skip`` or ``latest``.
        probe: record with every published version what an engine must answer once it has it.
    """

    root: str
    save_every: int = 1
    publish_every: int = 10
    publish_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    keep_latest: int = 3
    keep_every: int = 0
    keep_versions: int = 0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    vote_timeout_s: float = 60.0
    preempt_deadline_s: float = 25.0
    fresh: bool = False
    any_base: bool = False
    local_tier: str = ""
    wait_mirrored_s: float = 0.0
    when_busy: Literal["block", "skip", "latest"] = "block"
    probe: bool = True

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        positive("checkpoint", self, "save_every", "keep_latest")
        for key in ("publish_every", "keep_every", "keep_versions"):
            value = getattr(self, key)
            need("checkpoint", key=key, value=value, ok=value >= 0, wanted="at least 0")
        need("checkpoint", key="root", value=self.root, ok=bool(self.root), wanted="a path or URL")
        for key in ("vote_timeout_s", "preempt_deadline_s"):
            value = getattr(self, key)
            need("checkpoint", key=key, value=value, ok=value > 0, wanted="> 0")
        wait = self.wait_mirrored_s
        need("checkpoint", key="wait_mirrored_s", value=wait, ok=wait >= 0, wanted="at least 0")
        if wait and not self.local_tier:
            msg = "checkpoint.wait_mirrored_s waits for checkpoint.local_tier, which is not set"
            raise TrainConfigError(msg)
