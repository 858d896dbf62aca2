"""PEFT's model in accelerate's loop, as TRL's trainers and scripts have it, with checkpoints.

    accelerate launch examples/peft_loop.py --out runs/peft      # or: python, or torchrun

The lines that end in ``# ckpt`` are all that it takes. Stop it at any moment and start it again:
it goes on where it stopped, bit for bit. ``runs/peft/adapters`` holds PEFT directories, each
complete when it is seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM

from ckpt import CheckpointManager, Retention, TrainState  # ckpt


def tiny_model() -> LlamaForCausalLM:
    """A random model; put AutoModelForCausalLM.from_pretrained(...) here."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )
    )


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; the losses of this process, by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/peft")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(tiny_model(), lora)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=options.steps)
    tokens = torch.randint(64, (64, 8), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(tokens), batch_size=4)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    batches = [ids for (ids,) in loader]

    state = TrainState(model, optimizer, scheduler)  # ckpt
    manager = CheckpointManager(options.out, retention=Retention(latest=3))  # ckpt
    done = manager.restore(state)  # ckpt
    losses = []
    for step in range(0 if done is None else done + 1, options.steps):  # ckpt
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        manager.save(step, state, publish=step % 5 == 4)  # ckpt
    manager.close()  # ckpt
    return losses


if __name__ == "__main__":
    print(main())
