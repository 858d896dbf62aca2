"""The settings of a training run: TOML in, frozen dataclasses out.

Every section is one dataclass, most of :mod:`archon_lora.rl.sections`; a key that no dataclass
knows is an error that names it.
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
from archon_lora.models.parallel_dims import ParallelDims
from archon_lora.peft_config import REFUSED
from archon_lora.rl.decode import decode_section
from archon_lora.rl.sections import (
    CheckpointSection,
    EngineSection,
    GRPOSection,
    LoRASection,
    ModelSection,
    OptimizerSection,
    RolloutSection,
    RunSection,
    TaskSection,
)
from archon_lora.rl.warm import WarmStartSection

__all__ = [
    "CheckpointSection",
    "EngineSection",
    "GRPOSection",
    "LoRASection",
    "ModelSection",
    "OptimizerSection",
    "RolloutSection",
    "RunSection",
    "TaskSection",
    "TrainConfig",
    "load_config",
    "parse_config",
]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All sections of a run."""

    model: ModelSection
    checkpoint: CheckpointSection
    run: RunSection = field(default_factory=RunSection)
    lora: LoRASection = field(default_factory=LoRASection)
    parallel: ParallelDims = field(default_factory=ParallelDims)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    task: TaskSection = field(default_factory=TaskSection)
    rollout: RolloutSection = field(default_factory=RolloutSection)
    engine: EngineSection = field(default_factory=EngineSection)
    grpo: GRPOSection = field(default_factory=GRPOSection)
    warm_start: WarmStartSection = field(default_factory=WarmStartSection)

    def __post_init__(self) -> None:
        """Check what concerns several sections (:class:`TrainConfigError`)."""
        if self.grpo.reference == "warm-start" and not self.warm_start.url:
            msg = (
                "grpo.reference='warm-start' names the adapter that the run begins with, and "
                "warm_start.url is empty; set it, or set grpo.reference='base'"
            )
            raise TrainConfigError(msg)
        if self.parallel.pp > 1:
            msg = (
                f"parallel.pp={self.parallel.pp}: rollouts and probes of this job are computed by "
                "a model that has all of its layers; use dp_shard and tp, and pp with the engine "
                "alone (EngineConfig)"
            )
            raise TrainConfigError(msg)
        source, urls = self.rollout.source, self.engine.urls
        if (source == "local") == bool(urls):
            msg = (
                f"rollout.source={source!r} and engine.urls={list(urls)!r} do not fit: an engine "
                "needs at least one address (--engine), local rollouts take none"
            )
            raise TrainConfigError(msg)
        if source == "local":
            return
        if self.engine.quorum > len(urls):
            msg = f"engine.quorum={self.engine.quorum}, and engine.urls names {len(urls)}"
            raise TrainConfigError(msg)
        bound = self.rollout.max_staleness
        if self.engine.handover_every > bound + 1:
            msg = (
                f"engine.handover_every={self.engine.handover_every} lets samples be "
                f"{self.engine.handover_every - 1} versions old, and rollout.max_staleness is "
                f"{bound}; raise the bound, or hand over more often"
            )
            raise TrainConfigError(msg)
        if self.checkpoint.when_busy != "block":
            msg = (
                f"checkpoint.when_busy={self.checkpoint.when_busy!r} may leave out the version "
                "that rollouts wait for; with an engine it must be 'block'"
            )
            raise TrainConfigError(msg)
        if not self.checkpoint.probe:
            msg = (
                "checkpoint.probe=false leaves no way to prove what an engine serves; with "
                f"rollout.source={source!r} it must be true"
            )
            raise TrainConfigError(msg)

    @property
    def reference(self) -> Literal["base", "warm-start"]:
        """What the policy is to stay near to, once ``auto`` is made out."""
        if self.grpo.reference != "auto":
            return self.grpo.reference
        return "warm-start" if self.warm_start.url else "base"

    @property
    def ahead(self) -> int:
        """Batches that are sampled ahead of the one being trained on.

        With versions handed over every step that is ``max_staleness``; with fewer of them, the
        age that samples have from the start is taken off.
        """
        every = 1 if self.rollout.source == "local" else self.engine.handover_every
        return self.rollout.max_staleness - (every - 1)

    @property
    def patience_s(self) -> float:
        """Seconds that ranks wait for each other's samples."""
        if self.rollout.source == "local":
            return self.run.timeout_s
        return self.engine.batch_timeout_s + self.run.timeout_s

    def resume_key(self) -> dict[str, Any]:
        """What must not change between a checkpoint and the run that goes on from it.

        Other settings (steps, cadence, root, learning rate) may change on purpose; who samples,
        and how old samples may be, too: each sample says which version made it.
        """
        rollout = dataclasses.asdict(self.rollout)
        for key in ("source", "max_staleness"):
            del rollout[key]
        return {
            "seed": self.run.seed,
            "task": dataclasses.asdict(self.task),
            "rollout": rollout,
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
    lora = data.get("lora")
    for name in lora if isinstance(lora, Mapping) else ():
        if name in REFUSED:
            msg = f"lora.{name} is not supported: {REFUSED[name]}"
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
