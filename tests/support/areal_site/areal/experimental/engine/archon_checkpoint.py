"""A stand-in for AReaL's writing and reading of whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)


def save_model_to_hf(engine: Any, path: str) -> None:
    state = engine.state_dict_adapter.to_hf(get_model_state_dict(engine.model))
    state = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in state.items()}
    if dist.get_rank() == 0:
        Path(path).mkdir(parents=True, exist_ok=True)
        save_file(state, Path(path, "model.safetensors"))
    dist.barrier(group=engine.cpu_group)


def load_model_from_hf(engine: Any, path: str) -> None:
    """Asks for what the adapter maps the model's own names to, as AReaL does."""
    held = {n: t for m in engine.model_parts for n, t in get_model_state_dict(m).items()}
    wanted = engine.state_dict_adapter.to_hf(held)
    stored = load_file(Path(path, "model.safetensors"))
    found = {name: stored[name] for name in wanted}
    options = StateDictOptions(strict=False, full_state_dict=True)
    for model in engine.model_parts:
        set_model_state_dict(model, engine.state_dict_adapter.from_hf(found), options=options)
    dist.barrier(group=engine.cpu_group)
