"""The settings of a training run: TOML in, frozen dataclasses out.

Every section is one dataclass; a key that no dataclass knows is an error that names it. The
sections are documented key by key in ``docs/main-job.md``.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from archon_lora.errors import TrainConfigError
from archon_lora.rl.decode import decode_section
from archon_lora.rl.warm import WarmStartSection


def _need(section: str, *, key: str, value: object, ok: bool, wanted: str) -> None:
    """Raise :class:`TrainConfigError` naming ``section.key`` unless ``ok``."""
    if not ok:
        msg = f"{section}.{key} must be {wanted}, got {value!r}"
        raise TrainConfigError(msg)


def _positive(section: str, obj: object, *keys: str) -> None:
    """Each of ``keys`` must be at least 1."""
    for key in keys:
        value = getattr(obj, key)
        _need(section, key=key, value=value, ok=value >= 1, wanted="at least 1")


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
        _positive("run", self, "steps", "threads")
        _need("run", key="seed", value=self.seed, ok=self.seed >= 0, wanted="at least 0")
        _need("run", key="timeout_s", value=self.timeout_s, ok=self.timeout_s > 0, wanted="> 0")
        _need("run", key="metrics", value=self.metrics, ok=bool(self.metrics), wanted="a path")


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
        _need("optimizer", key="lr", value=self.lr, ok=self.lr > 0, wanted="> 0")
        _need(
            "optimizer",
            key="betas",
            value=self.betas,
            ok=len(self.betas) == 2,
            wanted="two numbers",
        )
        _need(
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
        _positive("task", self, "length", "digits")


@dataclass(frozen=True, kw_only=True)
class RolloutSection:
    """How completions are sampled.

    Attributes:
        prompts_per_step: prompts in a batch, over all ranks.
        group_size: completions per prompt; advantages are normalised within the group.
        max_new_tokens: longest completion in tokens.
        temperature: divides the logits, for sampling and for every log-probability.
        max_staleness: optimizer steps by which the sampling policy may lag; 0 is synchronous.
    """

    prompts_per_step: int = 4
    group_size: int = 8
    max_new_tokens: int = 12
    temperature: float = 1.0
    max_staleness: int = 1

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        _positive("rollout", self, "prompts_per_step", "max_new_tokens")
        _need(
            "rollout",
            key="group_size",
            value=self.group_size,
            ok=self.group_size >= 2,
            wanted="at least 2 (advantages are relative to the group)",
        )
        _need(
            "rollout",
            key="temperature",
            value=self.temperature,
            ok=self.temperature > 0,
            wanted="> 0",
        )
        _need(
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
class GRPOSection:
    """The loss.

    Attributes:
        clip: half-width of the interval that the policy ratio is clipped to.
        kl_coef: weight of the KL estimate against the frozen base.
        advantage_eps: added to a group's standard deviation.
    """

    clip: float = 0.2
    kl_coef: float = 0.01
    advantage_eps: float = 1e-4

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        _need("grpo", key="clip", value=self.clip, ok=0 < self.clip < 1, wanted="between 0 and 1")
        _need("grpo", key="kl_coef", value=self.kl_coef, ok=self.kl_coef >= 0, wanted="at least 0")
        _need(
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

    def __post_init__(self) -> None:
        """Check ranges (:class:`TrainConfigError`)."""
        _positive("checkpoint", self, "save_every", "keep_latest")
        for key in ("publish_every", "keep_every", "keep_versions"):
            value = getattr(self, key)
            _need("checkpoint", key=key, value=value, ok=value >= 0, wanted="at least 0")
        _need("checkpoint", key="root", value=self.root, ok=bool(self.root), wanted="a path or URL")
        for key in ("vote_timeout_s", "preempt_deadline_s"):
            value = getattr(self, key)
            _need("checkpoint", key=key, value=value, ok=value > 0, wanted="> 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All sections of a run."""

    model: ModelSection
    checkpoint: CheckpointSection
    run: RunSection = field(default_factory=RunSection)
    lora: LoRASection = field(default_factory=LoRASection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    task: TaskSection = field(default_factory=TaskSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    grpo: GRPOSection = field(default_factory=GRPOSection)
    warm_start: WarmStartSection = field(default_factory=WarmStartSection)

    def resume_key(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it.

        Other settings (steps, cadence, root, learning rate) may change on purpose.
        """
        return {
            "seed": self.run.seed,
            "task": dataclasses.asdict(self.task),
            "rollout": dataclasses.asdict(self.rollout),
        }


def parse_config(data: Mapping[str, Any]) -> TrainConfig:
    """Check a decoded TOML document and fill in the defaults.

    Raises:
        TrainConfigError: an unknown section or key, a missing one, or a value out of range.
    """
    sections = [f.name for f in dataclasses.fields(TrainConfig)]
    for name in data:
        if name not in sections:
            msg = f"unknown section [{name}]; the sections are {', '.join(sorted(sections))}"
            raise TrainConfigError(msg)
    hints = typing.get_type_hints(TrainConfig)
    decoded: dict[str, Any] = {
        name: decode_section(hints[name], data.get(name, {}), name) for name in sections
    }
    return TrainConfig(**decoded)


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply ``section.key=value`` overrides.

    Relative ``model.path`` and ``run.metrics`` are taken from the working directory, as every
    command-line tool takes its paths.

    Raises:
        TrainConfigError: no such file, not TOML, or what :func:`parse_config` refuses.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        msg = f"cannot read the config {path}: {err.strerror}"
        raise TrainConfigError(msg) from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        msg = f"{path} is not valid TOML: {err}"
        raise TrainConfigError(msg) from err
    for text in overrides:
        _apply_override(data, text)
    return parse_config(data)


def _apply_override(data: dict[str, Any], text: str) -> None:
    """Set one dotted key; the value is TOML, or a plain string where it is not."""
    key, sign, raw = text.partition("=")
    section, dot, name = key.strip().partition(".")
    if not (sign and dot and section and name):
        msg = f"--set wants section.key=value, got {text!r}"
        raise TrainConfigError(msg)
    try:
        value = tomllib.loads(f"value = {raw.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    target = data.setdefault(section, {})
    if not isinstance(target, dict):
        msg = f"--set {key.strip()}: [{section}] is not a section in the file"
        raise TrainConfigError(msg)
    target[name] = value
