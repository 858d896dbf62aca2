"""An actor worker in the manner of verl: PEFT under FSDP2, with its checkpoints replaced.

    torchrun --nproc-per-node 2 examples/verl_worker.py --out runs/verl

verl's worker writes one file of ``torch.save`` a rank, blocking, for the same number of ranks
only. With the lines that end in ``# ckpt`` it returns after one copy, resumes on any number of
ranks, and every save is a PEFT directory that vLLM or SGLang load. ``ckpt import`` takes over the
steps that verl has written already.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from peft import LoraConfig, TaskType, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

from ckpt import CheckpointManager, TrainState  # ckpt


class ActorWorker:
    """What a trainer calls on every rank."""

    def __init__(self, out: str, steps: int) -> None:
        self.out = out
        self.steps = steps

    def init_model(self) -> None:
        """Model, adapter, sharding, optimizer; then the newest checkpoint, if there is one."""
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                vocab_size=64,
            )
        )
        model.enable_input_require_grads()
        lora = LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]
        )
        self.actor = get_peft_model(model, lora)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("fsdp",))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.actor, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.actor.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=self.steps)
        self.state = TrainState(self.actor, self.optimizer, self.scheduler)  # ckpt
        self.manager = CheckpointManager(self.out)  # ckpt

    def update_actor(self, ids: torch.Tensor) -> float:
        """One update on this rank's rows."""
        loss = self.actor(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return loss.item()

    def save_checkpoint(self, global_step: int) -> None:
        """Called by the trainer every ``save_freq`` steps."""
        self.manager.save(global_step, self.state, publish=True)  # ckpt

    def load_checkpoint(self) -> int | None:
        """Called by the trainer before the first step; the step that was restored."""
        return self.manager.restore(self.state)  # ckpt

    def finish(self) -> None:
        """Called by the trainer at the end."""
        self.manager.close()  # ckpt


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """The trainer's loop; the losses of this rank, by step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/verl")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    own = not dist.is_initialized()
    if own:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        dist.init_process_group("gloo")
    worker = ActorWorker(options.out, options.steps)
    worker.init_model()
    restored = worker.load_checkpoint()
    losses = []
    for step in range(0 if restored is None else restored + 1, options.steps):
        seed = 100 * step + dist.get_rank()
        ids = torch.randint(64, (4, 8), generator=torch.Generator().manual_seed(seed))
        losses.append(worker.update_actor(ids))
        worker.save_checkpoint(step)
    worker.finish()
    if own:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    print(main())
