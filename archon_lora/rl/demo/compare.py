"""Two comparisons with the committed bytes, in a process that has seen no training.

``python -m archon_lora.rl.demo.compare CONFIG STEP EXPORT`` restores a step on one rank, compares
every tensor with the bytes on storage, and the model's logits with those of PEFT and transformers
over the exported adapter. The findings go to stdout as one JSON object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archon_lora.adapter import adapters_disabled, gather
from archon_lora.rl.build import build_engine, build_manager
from archon_lora.rl.config import TrainConfig, load_config
from archon_lora.rl.loop import process_group
from archon_lora.rl.rollout import PromptStream
from ckpt.catalog import find_step
from ckpt.storage import open_storage
from ckpt.types import TensorRecord

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


def compare_state(config: TrainConfig, step: int, live: dict[str, Tensor]) -> dict[str, Any]:
    """Restored tensors against the committed bytes, read without any of the restore's code."""
    storage = open_storage(config.checkpoint.root, dict(config.checkpoint.storage_options) or None)
    entry = find_step(storage, step)
    if entry.manifest is None:
        msg = f"step {step} has no manifest"
        raise RuntimeError(msg)
    records = {record.name: record for record in entry.manifest.tensors}
    different = sorted(records.keys() ^ live.keys())
    size = 0
    for name in sorted(records.keys() & live.keys()):
        stored = _assemble(records[name], lambda f, a, b: storage.read(f"{entry.path}/{f}", a, b))
        restored = gather(live[name])
        size += stored.nbytes
        if stored.dtype != restored.dtype or not _same_bits(stored, restored):
            different.append(name)
    return {
        "tensors": len(records),
        "optimizer_tensors": sum(name.startswith("optim.") for name in records),
        "bytes": size,
        "written_by_ranks": entry.manifest.world_size,
        "different": different,
    }


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and bool(
        torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def _assemble(record: TensorRecord, read: Any) -> Tensor:
    """A whole tensor from the byte ranges that the manifest names."""
    whole = torch.empty(record.shape, dtype=_DTYPES[record.dtype])
    for chunk in record.chunks:
        data = bytearray(read(chunk.file, chunk.start, chunk.end))
        piece = torch.frombuffer(data, dtype=whole.dtype).reshape(chunk.sizes)
        where = tuple(
            slice(start, start + extent)
            for start, extent in zip(chunk.offsets, chunk.sizes, strict=True)
        )
        whole[where] = piece
    return whole


@torch.no_grad()
def compare_logits(config: TrainConfig, model: nn.Module, export: Path) -> dict[str, float]:
    """Logits of the Archon model and of PEFT over the export, on the same random tokens."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    served = PeftModel.from_pretrained(base, str(export)).eval()
    vocab = base.config.vocab_size
    tokens = torch.randint(vocab, (8, 24), generator=torch.Generator().manual_seed(0))
    ours = model(tokens)
    with adapters_disabled(model):
        plain = model(tokens)
    return {
        "max_difference": (ours - served(input_ids=tokens).logits).abs().max().item(),
        "adapter_effect": (ours - plain).abs().max().item(),
    }


def main(config_path: str, step: str, export: str) -> None:
    """Compare and print."""
    config = load_config(Path(config_path))
    torch.set_num_threads(config.run.threads)
    with process_group(config.run.timeout_s):
        engine = build_engine(config)
        engine.initialize()
        state = engine.train_state(dataloader=PromptStream())
        with build_manager(config) as manager:
            restored = manager.restore(state, step=int(step))
            found = {
                "restored": restored,
                "state": compare_state(config, int(step), state.live().tensors),
                "logits": compare_logits(config, engine.model.eval(), Path(export)),
            }
        engine.close()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
