"""Tiny engines, batches and losses for the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from archon_lora.config import LoRAConfig
from archon_lora.engine import ArchonEngine, EngineConfig, OptimizerConfig
from archon_lora.models.tiny import write_tiny_qwen2

VOCAB = 96
LORA = LoRAConfig(rank=4, alpha=8.0)
ADAM = OptimizerConfig(lr=1e-2)


def tiny_model(directory: Path, **options: Any) -> str:
    """A Qwen2 directory small enough for many engines."""
    sizes = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 24, **options}
    return str(write_tiny_qwen2(directory, **sizes))


def make_engine(
    path: str,
    *,
    lora: LoRAConfig | None = LORA,
    optimizer: OptimizerConfig | None = ADAM,
    initialize: bool = True,
    **options: Any,
) -> ArchonEngine:
    """An engine on the CPU."""
    engine = ArchonEngine(
        EngineConfig(path=path, lora=lora, optimizer=optimizer, device="cpu", **options)
    )
    if initialize:
        engine.initialize()
    return engine


def batch_of(rows: int = 4, tokens: int = 8, *, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens, and a mask that makes rows count differently."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=generator)
    lengths = torch.arange(rows).remainder(tokens - 2) + 2
    mask = torch.arange(tokens - 1)[None, :] < lengths[:, None]
    return {"input_ids": ids, "loss_mask": mask}


def my_rows(batch: dict[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """This rank's share of a global batch."""
    return {name: torch.tensor_split(value, world)[rank] for name, value in batch.items()}


def masked_loss(logits: Tensor, batch: Any) -> Tensor:
    """Mean cross entropy of the next tokens where the mask is set."""
    logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
    chosen = logprobs.gather(-1, batch["input_ids"][:, 1:].unsqueeze(-1)).squeeze(-1)
    return -(chosen * batch["loss_mask"]).sum() / batch["loss_mask"].sum()


def masked_tokens(batch: Any) -> float:
    """Weight of a micro batch: the tokens that count."""
    return float(batch["loss_mask"].sum())


def train(
    engine: ArchonEngine, steps: int, *, first: int = 0, rows: int = 4
) -> list[dict[str, float]]:
    """Updates on batches that depend on the step alone, shared over the ranks."""
    done = []
    for step in range(first, first + steps):
        mine = my_rows(batch_of(rows, seed=step), engine.dp_rank, engine.dp_size)
        done.append(engine.train_batch(mine, masked_loss, loss_weight_fn=masked_tokens))
    return done


def whole(tensor: Tensor) -> Tensor:
    """A copy of the full value on the host; collective for DTensors."""
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def weights_of(engine: ArchonEngine, *, trainable: bool | None = None) -> dict[str, Tensor]:
    """Full values of the parameters, all or by whether they train."""
    return {
        name: whole(parameter)
        for name, parameter in engine.model.named_parameters()
        if trainable is None or parameter.requires_grad == trainable
    }


def moved(engine: ArchonEngine) -> ArchonEngine:
    """Give B values: a fresh one is zero, and much would go unnoticed."""
    with torch.no_grad():
        for name, parameter in sorted(engine.model.named_parameters()):
            if "lora_b" in name:
                generator = torch.Generator().manual_seed(len(name))
                value = torch.randn(parameter.shape, generator=generator)
                local = parameter
                if isinstance(parameter, DTensor):
                    chunk = parameter.__create_chunk_list__()[0]
                    place = tuple(
                        slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)
                    )
                    local, value = parameter.to_local(), value[place]
                local.copy_(value)
    return engine


def names_in(directory: Path) -> list[str]:
    """What lies in a directory, sorted."""
    return sorted(path.name for path in directory.iterdir())
