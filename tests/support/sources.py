"""What other trainers leave behind, small: verl, torchtune, prime-rl, PEFT, as each writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from ckpt.peft import write_adapter_dir
from support import stock


def verl(step: Path, **changes: Any) -> Path:
    """The files of one rank; ``changes`` replace what model, optim or extra_state hold."""
    model, optimizer = stock.model_and_optimizer()
    held = {"model": model.state_dict(), "optim": optimizer.state_dict()} | changes
    (step / "actor").mkdir(parents=True)
    for kind, value in held.items():
        torch.save(value, step / f"actor/{kind}_world_size_1_rank_0.pt")
    return step


def torchtune(
    folder: Path, tensors: dict[str, Any] | None = None, *, config: Any = None, rows: int = 8
) -> Path:
    """An adapter of one layer of rank 2 beside its base model's configuration."""
    folder.mkdir(parents=True)
    name = "layers.0.attn.q_proj"
    whole = {
        f"{name}.lora_a.weight": torch.ones(2, 8),
        f"{name}.lora_b.weight": torch.ones(rows, 2),
    }
    torch.save(whole if tensors is None else tensors, folder / "adapter_model.pt")
    base = {"model_type": "llama", "num_attention_heads": 2, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(base if config is None else config))
    return folder


def prime_rl(step: Path, name: str = "app") -> Path:
    """A step with a model and the data position of its one rank."""
    saved = {name: {"model": {"w": torch.ones(2)}, "progress": {"step": 3}}}
    dcp.save(saved, checkpoint_id=str(step / "trainer"), no_dist=True)
    (step / "trainer/dataloader").mkdir()
    torch.save({"at": 1}, step / "trainer/dataloader/rank_0.pt")
    return step


def peft(folder: Path, **changes: Any) -> Path:
    """An adapter's directory; ``changes`` are settings of its configuration."""
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {key.format("A"): torch.ones(2, 8), key.format("B"): torch.ones(8, 2)}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
        **changes,
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_adapter_dir(str(folder), tensors, config)
    return folder
