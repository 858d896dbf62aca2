"""What engines with pipeline stages do, and the same on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from archon_lora.config import LoRAConfig
from archon_lora.engine import (
    ArchonEngine,
    SaveLoadMeta,
    keep_reference,
    load_lora_adapter,
    save_lora_adapter,
    warm_start,
)
from archon_lora.engine.full_checkpoint import save_full_model
from archon_lora.models.parallel_dims import ParallelDims
from ckpt import CheckpointManager
from support.engines import batch_of, make_engine, masked_loss, masked_tokens, my_rows
from support.ranks_engine import RecordingSink

ROWS = 8
EVERYWHERE = LoRAConfig(rank=2, alpha=4.0)
LATE = LoRAConfig(
    rank=2,
    alpha=4.0,
    exclude_modules=r"model\.layers\.[01]\..*",
    rank_pattern={r"model\.layers\.3\.mlp\.up_proj": 3},
)
"""Nothing in the first half of four layers, so nothing on the first of two stages."""

CASES: dict[str, dict[str, Any]] = {
    "1f1b": {"micro_batches": 4},
    "gpipe": {"micro_batches": 2, "pp_schedule": "gpipe"},
    "interleaved": {"micro_batches": 4, "pp_stages": 2, "pp_schedule": "interleaved"},
    "late": {"micro_batches": 4, "lora": LATE},
    "bf16": {"micro_batches": 4, "dtype": "bfloat16", "activation_checkpointing": True},
    "full": {"micro_batches": 2, "lora": None},
}
"""What makes each case special; on one rank without the pipeline's own settings."""


def engine_of(path: str, pp: int, **options: Any) -> ArchonEngine:
    if pp == 1:
        options = {name: v for name, v in options.items() if not name.startswith("pp_")}
    return make_engine(
        path, parallel=ParallelDims(pp=pp), **{"lora": EVERYWHERE, "micro_batches": pp, **options}
    )


def update(engine: ArchonEngine, step: int, *, tokens: int = 8) -> dict[str, float]:
    rows = my_rows(batch_of(ROWS, tokens, seed=step), engine.dp_rank, engine.dp_size)
    return engine.train_batch(rows, masked_loss, loss_weight_fn=masked_tokens)


def training(path: str, pp: int, name: str) -> dict[str, Any]:
    """Three updates, the last of another length, and what the model computes then."""
    with engine_of(path, pp, **CASES[name]) as engine:
        done = [update(engine, step, tokens=8 if step < 2 else 6) for step in range(3)]
        mask = torch.ones(3, 8, dtype=torch.int64)
        mask[1, :3] = 0
        batch = {**batch_of(3), "attention_mask": mask}
        found = {
            "done": done,
            "logprobs": engine.logprobs(batch),
            "logits": engine.forward(batch_of(2)),
            "model": hasattr(engine, "model"),
            "trained": sum(p.numel() for p in engine.trainable_params()),
            "parts": [sorted(part.layers) for part in engine.model_parts],
        }
        if engine.lora_config is not None:
            found["reference"] = engine.logprobs(batch, reference=True)
        return found


def accumulated(path: str, pp: int) -> float:
    """The norm of the gradients of two batches of different lengths, added up."""
    with engine_of(path, pp, micro_batches=4) as engine:
        for step, tokens in enumerate((8, 6)):
            engine.forward_backward(batch_of(ROWS, tokens, seed=step), masked_loss)
        return engine.optimizer_step()


def products(path: str, pp: int, folder: str, load: str | None) -> dict[str, Any]:
    """Everything that is made of an adapter that the first stage has no part of."""
    with engine_of(path, pp, lora=LATE, reference="warm-start") as engine:
        if load is None:
            update(engine, 0)
            keep_reference(engine)
            update(engine, 1)
            engine.set_version(2)
            engine.save(SaveLoadMeta(path=f"{folder}/resume", with_optim=True))
        else:
            engine.load(SaveLoadMeta(path=f"{load}/resume", with_optim=True))
        save_lora_adapter(engine, f"{folder}/adapter", "base")
        sink = RecordingSink()
        engine.sinks.append(sink)
        with CheckpointManager(f"{folder}/run", process_group=engine.cpu_group) as manager:
            engine.manager = manager
            handle = engine.update_weights(3)
            assert handle is not None
            version = handle.published.result(30)
            manager.save(7, engine.train_state(), publish=True).wait(30)
        assert version is not None
        found: dict[str, Any] = {
            "served": sink.calls,
            "published": version.adapter_sha256,
            "logprobs": engine.logprobs(batch_of(2)),
            "reference": engine.logprobs(batch_of(2), reference=True),
            "version": engine.get_version(),
            "next": update(engine, 2),
        }
        load_lora_adapter(engine, f"{folder}/adapter")
        found["loaded"] = engine.logprobs(batch_of(2))
        warm_start(engine, f"{folder}/run/adapters/run-v{1:08}", any_base=True)
        found["warm"] = engine.logprobs(batch_of(2))
        return found


def whole_model(path: str, pp: int, out: str) -> dict[str, Any]:
    """A model that trains whole, saved before it has; and resumed from another division."""
    with engine_of(path, pp, lora=None) as engine:
        save_full_model(engine, f"{out}/saved")
        update(engine, 0)
        engine.save(SaveLoadMeta(path=f"{out}/resume", weight_format="dcp", with_optim=True))
        return {"next": update(engine, 1)}


def go_on(path: str, pp: int, out: str) -> dict[str, Any]:
    with engine_of(path, pp, lora=None) as engine:
        engine.load(SaveLoadMeta(path=f"{out}/resume", weight_format="dcp", with_optim=True))
        return {"next": update(engine, 1)}


def refusals(rank: int, path: str) -> dict[str, str]:
    """What a batch must not be; and that the engine goes on afterwards."""
    said = {}
    with engine_of(path, 2, micro_batches=4) as engine:
        for name, batch in {
            "rows": my_rows(batch_of(2 * ROWS), rank, 2),
            "uneven": batch_of(6),
            "length": batch_of(ROWS, 8 + rank),
        }.items():
            try:
                engine.train_batch(batch, masked_loss)
            except ValueError as error:
                said[name] = str(error)
        update(engine, 0)
    return said


def on_two_ranks(rank: int, world: int, path: str, folder: str) -> dict[str, Any]:
    """All that needs two stages; what one rank saved is there already."""
    found: dict[str, Any] = {name: training(path, 2, name) for name in CASES}
    found["accumulated"] = accumulated(path, 2)
    found["products"] = products(path, 2, f"{folder}/two", None)
    found["from one"] = products(path, 2, f"{folder}/two from one", f"{folder}/one")
    found["whole"] = whole_model(path, 2, f"{folder}/whole two")
    found["whole from one"] = go_on(path, 2, f"{folder}/whole one")
    found["refused"] = refusals(rank, path)
    dist.barrier()
    return found


def on_one_rank(path: str, folder: str) -> dict[str, Any]:
    found: dict[str, Any] = {name: training(path, 1, name) for name in CASES}
    found["accumulated"] = accumulated(path, 1)
    found["products"] = products(path, 1, f"{folder}/one", None)
    found["whole"] = whole_model(path, 1, f"{folder}/whole one")
    return found


def back_on_one_rank(path: str, folder: str) -> dict[str, Any]:
    return {
        "from two": products(path, 1, f"{folder}/one from two", f"{folder}/two"),
        "whole from two": go_on(path, 1, f"{folder}/whole two"),
    }


def files(folder: Path) -> dict[str, bytes]:
    """The files right in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
