"""From settings to the parts of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tokenizers import Tokenizer

from archon_lora.apply import apply_lora
from archon_lora.config import LoRAConfig
from archon_lora.engine import ArchonEngine, EngineConfig, OptimizerConfig
from archon_lora.engine.build import DTYPES
from archon_lora.errors import LoRAConfigError, ModelLoadError, TrainConfigError
from archon_lora.models import load_pretrained
from archon_lora.models.hf_files import read_config
from archon_lora.rl.config import TrainConfig
from archon_lora.rl.probing import ProbeRecorder
from archon_lora.rl.rollout import SampleMaker, share
from archon_lora.rl.rollouts import LocalRollouts, Rollouts
from archon_lora.rl.sampling import LocalPolicy
from archon_lora.rl.scorer import Scorer
from archon_lora.rl.task import make_task
from ckpt import CheckpointManager, Retention

TOKENIZER = "tokenizer.json"

_PROBE_PROMPTS = 8
_PROBE_TOKENS = 32
"""An engine answers a probe of this length in one short step."""


def check_model_directory(path: Path) -> None:
    """Say early, in one line, what a model directory lacks.

    Raises:
        ModelLoadError: no such directory, or no tokenizer in it.
    """
    if not path.is_dir():
        msg = (
            f"model.path is {path}, which is no directory; give a HuggingFace model directory, or "
            f"make a tiny one: archon-lora make-tiny {path}"
        )
        raise ModelLoadError(msg)
    if not (path / TOKENIZER).is_file():
        msg = (
            f"{path} has no {TOKENIZER}; save the tokenizer there, e.g. with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
        raise ModelLoadError(msg)


def load_tokenizer(path: Path) -> Tokenizer:
    """Read ``tokenizer.json``.

    Raises:
        ModelLoadError: the file is not one.
    """
    try:
        return Tokenizer.from_file(str(path / TOKENIZER))
    except Exception as err:  # the library raises Exception itself for a bad file
        msg = f"{path / TOKENIZER} cannot be read as a tokenizer: {err}"
        raise ModelLoadError(msg) from err


def stop_ids(config: Mapping[str, Any]) -> list[int]:
    """``eos_token_id`` of a ``config.json``: none, one, or several."""
    value = config.get("eos_token_id")
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


def lora_config(config: TrainConfig) -> LoRAConfig:
    """The adapter's settings.

    Raises:
        LoRAConfigError: a value that cannot work.
    """
    section = config.lora
    try:
        return LoRAConfig(
            rank=section.rank,
            alpha=section.alpha,
            dropout=section.dropout,
            target_modules=section.target_modules,
            exclude_modules=section.exclude_modules,
            use_rslora=section.use_rslora,
            seed=config.run.seed,
        )
    except LoRAConfigError as err:
        msg = f"lora.{err}"  # its messages begin with the name of the setting
        raise LoRAConfigError(msg) from err


def optimizer_config(config: TrainConfig) -> OptimizerConfig:
    """The optimizer's settings.

    Raises:
        TrainConfigError: a value that cannot work.
    """
    section, steps = config.optimizer, config.run.steps
    if section.schedule != "constant" and steps <= section.warmup_steps:
        msg = (
            f"run.steps must be above optimizer.warmup_steps ({section.warmup_steps}) with "
            f"optimizer.schedule={section.schedule!r}, got {steps}"
        )
        raise TrainConfigError(msg)
    try:
        return OptimizerConfig(
            lr=section.lr,
            betas=(section.betas[0], section.betas[1]),
            eps=section.eps,
            weight_decay=section.weight_decay,
            grad_clip=section.grad_clip,
            schedule=section.schedule,
            warmup_steps=section.warmup_steps,
            total_steps=steps if section.schedule != "constant" else None,
        )
    except ValueError as err:
        msg = f"optimizer.{err}"  # its messages begin with the name of the setting
        raise TrainConfigError(msg) from err


def build_engine(config: TrainConfig) -> ArchonEngine:
    """An engine, not yet initialised.

    Raises:
        TrainConfigError: optimizer or engine settings that cannot work.
        LoRAConfigError: adapter settings that cannot work.
    """
    lora, optimizer = lora_config(config), optimizer_config(config)
    try:
        return ArchonEngine(
            EngineConfig(
                path=config.model.path,
                base_name=config.model.name or config.model.path,
                dtype=config.model.dtype,
                device=config.model.device,
                lora=lora,
                reference=config.reference,
                parallel=config.parallel,
                optimizer=optimizer,
                micro_batches=config.optimizer.micro_batches,
                seed=config.run.seed,
                temperature=config.rollout.temperature,
                barrier_timeout=config.run.timeout_s,
            )
        )
    except ValueError as err:
        msg = f"the engine's settings cannot work: {err}"
        raise TrainConfigError(msg) from err


def build_maker(config: TrainConfig, engine: ArchonEngine) -> SampleMaker:
    """This rank's sampler, with a model copy of its own beside the trainer's shards.

    Raises:
        ModelLoadError: the model or its tokenizer cannot be read.
        TrainConfigError: an unknown kind of task.
    """
    path = Path(config.model.path)
    model, names = load_pretrained(path, dtype=DTYPES[config.model.dtype], device=engine.device)
    apply_lora(model, lora_config(config), name_map=names.module_to_hf)
    policy = LocalPolicy(
        model,
        stop_ids=stop_ids(read_config(path)),
        temperature=config.rollout.temperature,
        max_new=config.rollout.max_new_tokens,
    )
    return SampleMaker(
        policy=policy,
        tokenizer=load_tokenizer(path),
        task=make_task(config.task, seed=config.run.seed),
        section=config.rollout,
        seed=config.run.seed,
        indices=share(config.rollout.samples, engine.rank, engine.world_size),
    )


def build_manager(config: TrainConfig) -> CheckpointManager:
    """The run's checkpoint manager.

    Raises:
        ConfigError: a root or a setting that cannot work.
    """
    section = config.checkpoint
    return CheckpointManager(
        section.root,
        retention=Retention(
            latest=section.keep_latest,
            every=section.keep_every or None,
            versions=section.keep_versions or None,
        ),
        storage_options=dict(section.storage_options) or None,
        process_group=dist.group.WORLD,
        run_name=config.run.name,
        fresh=section.fresh,
        publish_dtype=section.publish_dtype,
        vote_timeout=section.vote_timeout_s,
        local_tier=section.local_tier or None,
        when_busy=section.when_busy,
    )


def build_probe(config: TrainConfig, engine: ArchonEngine) -> ProbeRecorder | None:
    """What records, with every published version, what an engine must answer; None for nothing.

    The first rank gets a copy of the model in the engines' dtype for it.

    Raises:
        ModelLoadError: the model or its tokenizer cannot be read.
    """
    publishes = config.checkpoint.publish_every or config.rollout.source != "local"
    if not (config.checkpoint.probe and publishes):
        return None
    scorer = build_scorer(config, engine) if engine.rank == 0 else None
    return ProbeRecorder(
        engine,
        scorer,
        publish_dtype=DTYPES[config.checkpoint.publish_dtype],
        tolerance=config.engine.tolerance,
        timeout=config.run.timeout_s,
    )


def build_scorer(config: TrainConfig, engine: ArchonEngine) -> Scorer:
    """The model as engines serve it, on this rank's device.

    Raises:
        ModelLoadError: the model or its tokenizer cannot be read.
    """
    path, dtype = Path(config.model.path), DTYPES[config.engine.dtype]
    model, names = load_pretrained(path, dtype=dtype, device=engine.device)
    # Published adapters have their scaling folded into B, which is alpha = rank.
    served = dataclasses.replace(
        lora_config(config),
        alpha=float(config.lora.rank),
        use_rslora=False,
        dropout=0.0,
        adapter_dtype=dtype,
    )
    apply_lora(model, served, name_map=names.module_to_hf)
    task = make_task(config.task, seed=config.run.seed)
    tokenizer = load_tokenizer(path)
    prompts = [task.question(position).prompt for position in range(_PROBE_PROMPTS)]
    ids = tokenizer.encode("".join(prompts), add_special_tokens=False).ids
    return Scorer(model, prompt=tuple(ids[:_PROBE_TOKENS]))


def build_rollouts(
    config: TrainConfig,
    engine: ArchonEngine,
    group: dist.ProcessGroup,
    probe: ProbeRecorder | None,
) -> Rollouts:
    """Whoever samples.

    Args:
        config: the settings.
        engine: the trainer's.
        group: ranks that exchange samples.
        probe: whose model checks what an engine samples.

    Raises:
        ModelLoadError: the model or its tokenizer cannot be read.
        TrainConfigError: an unknown kind of task.
        ConfigError: an engine's address that is none.
    """
    if config.rollout.source != "local":
        try:
            from archon_lora.rl.build_fleet import build_engine_rollouts
        except ModuleNotFoundError as err:
            msg = (
                f"rollout.source={config.rollout.source!r} needs {err.name}, which is not "
                "installed: pip install 'archon-lora[handoff]'"
            )
            raise TrainConfigError(msg) from err
        scorer = None if probe is None else probe.scorer
        return build_engine_rollouts(config, group, scorer)
    return LocalRollouts(
        engine,
        build_maker(config, engine).make,
        group=group,
        max_staleness=config.rollout.max_staleness,
        timeout=config.run.timeout_s,
    )
