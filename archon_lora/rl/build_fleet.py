"""From settings to the replicas that sample; imported only where an engine does."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from archon_lora.models.hf_files import read_config
from archon_lora.rl.build import load_tokenizer, stop_ids
from archon_lora.rl.config import TrainConfig
from archon_lora.rl.fleet import Fleet
from archon_lora.rl.rollout_engine import EngineRollouts
from archon_lora.rl.scorer import Scorer
from archon_lora.rl.task import make_task
from ckpt.handoff.cache import VersionCache
from ckpt.handoff.drivers import open_engine
from ckpt.handoff.handover import Handover
from ckpt.handoff.registry import Registry
from ckpt.handoff.replica_poster import HandoverBoard
from ckpt.storage import open_storage

API_KEY = "ARCHON_ENGINE_API_KEY"
"""Environment variable with what the replicas were started with as ``--api-key``."""


def build_engine_rollouts(
    config: TrainConfig, group: dist.ProcessGroup, scorer: Scorer | None
) -> EngineRollouts:
    """Rollouts by the engine that ``[engine]`` describes.

    Args:
        config: the settings.
        group: the ranks that train.
        scorer: the trainer's own copy of what is served, on the first rank alone.

    Raises:
        ConfigError: an address that is none, or a cache that another process owns.
        ModelLoadError: the tokenizer cannot be read.
    """
    return EngineRollouts(
        None if scorer is None else build_fleet(config, scorer),
        group=group,
        handover_every=config.engine.handover_every,
        max_staleness=config.rollout.max_staleness,
        batch_timeout=config.engine.batch_timeout_s,
        patience=config.patience_s,
        closing=config.run.timeout_s,
    )


def build_fleet(config: TrainConfig, scorer: Scorer) -> Fleet:
    """The replicas that ``[engine]`` names; nothing is sent to them yet.

    Raises:
        ConfigError: an address that is none, or a cache that another process owns.
        ModelLoadError: the tokenizer cannot be read.
    """
    section, path = config.engine, Path(config.model.path)
    key = os.environ.get(API_KEY)
    engines = [
        open_engine(
            f"{config.rollout.source}+{url}", api_key=key, timeout_s=section.request_timeout_s
        )
        for url in section.urls
    ]
    # With a local tier, a version is there before it is at the root.
    tier = config.checkpoint.local_tier
    options = dict(config.checkpoint.storage_options) or None
    registry = Registry(
        tier or config.checkpoint.root,
        run=config.run.name,
        storage_options=None if tier else options,
    )
    cache = section.cache or Path(config.run.metrics).resolve().parent / "adapters"
    return Fleet(
        engines=engines,
        handover=Handover(
            engines,
            holder="trainer",
            slots=section.slots,
            registry=registry,
            retries=0,  # batches are tried again as a whole
            quorum=section.quorum,
            on_report=HandoverBoard(
                open_storage(config.checkpoint.root, options),
                run=config.run.name,
                holder="trainer",
                engines=[engine.url for engine in engines],
            ),
        ),
        registry=registry,
        # What replicas hold, each perhaps others, what is on its way, and one that was just left.
        cache=VersionCache(cache, max_versions=section.slots * len(engines) + 2),
        scorer=scorer,
        tokenizer=load_tokenizer(path),
        task=make_task(config.task, seed=config.run.seed),
        rollout=config.rollout,
        section=section,
        stop_ids=tuple(stop_ids(read_config(path))),
        seed=config.run.seed,
    )
